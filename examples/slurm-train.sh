#!/bin/sh
# Trains one run on two nodes of a SLURM cluster, with a process for each GPU. Configuration, dataset
# and run lie on a file system that the nodes share. There, with fastlab's environment activated:
#
#     sbatch --gpus-per-node=4 --time=600 examples/slurm-train.sh \
#         --config configs/resnet11.toml --out runs/two-nodes
#
# To resume, pass `--resume runs/two-nodes` instead.
#SBATCH --job-name=fastlab
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1

MAIN=$(hostname) # this script runs on the first node
PORT=$((20000 + SLURM_JOB_ID % 10000))
PROCESSES=$((SLURM_NNODES * ${SLURM_GPUS_ON_NODE:-1}))
export MAIN PORT PROCESSES
# On each node, one launcher.
srun sh -c 'accelerate launch --multi_gpu --mixed_precision no --dynamo_backend no \
    --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" --num_processes "$PROCESSES" \
    --main_process_ip "$MAIN" --main_process_port "$PORT" -m fastlab.train "$@"' sh "$@"
