"""A loader and a step to look into: an ImageFolder read by a DataLoader, and a small ResNet.

fastlab synth scratch/photos --classes 10 --per-class 200
fastlab bottleneck examples/bottleneck.py:make_loader --step examples/bottleneck.py:train_step
"""

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18

FOLDER = "scratch/photos/train"

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
model = resnet18(num_classes=10).to(device)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)


def make_loader() -> DataLoader:
    """Batches of float32 [32, 3, 64, 64] and int64 [32]."""
    augment = transforms.Compose(
        [
            transforms.RandomResizedCrop(64),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.4, 0.4, 0.4),
            transforms.ToTensor(),
        ]
    )
    dataset = ImageFolder(FOLDER, augment)
    return DataLoader(dataset, 32, shuffle=True, num_workers=2, drop_last=True)


def train_step(batch: list[torch.Tensor]) -> None:
    images, labels = (part.to(device, non_blocking=True) for part in batch)
    loss = cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
