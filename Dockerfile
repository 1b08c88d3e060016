# fastlab on a CPU; for NVIDIA GPUs, TORCH_INDEX names the packages built for CUDA (docs/install.md).
# The base image is pinned by its tag; a digest would pin its content, too.
FROM python:3.12-slim-bookworm AS build
# The context holds no git history, from whose tags the version comes elsewhere.
ARG VERSION=0.1.0.dev0+docker
WORKDIR /source
RUN pip install --no-cache-dir build==1.6.1
COPY pyproject.toml README.md LICENSE ./
COPY benchmarks benchmarks
COPY configs configs
COPY examples examples
COPY fastlab fastlab
COPY pipelines pipelines
RUN SETUPTOOLS_SCM_PRETEND_VERSION="$VERSION" python -m build --wheel --outdir /dist

FROM python:3.12-slim-bookworm
# torch.compile calls a C++ compiler on a CPU, and a C compiler on a GPU. Debian keeps no earlier
# versions of a package, so that a pinned one could not be installed for long.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=bind,from=build,source=/dist,target=/dist \
    pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" /dist/*.whl
# User 1000, or any that `docker run --user` gives, which then has no name of its own.
RUN useradd --uid 1000 --create-home --home-dir /fastlab fastlab
ENV HOME=/fastlab USER=fastlab
USER 1000
WORKDIR /fastlab
ENTRYPOINT ["fastlab"]
CMD ["--help"]
