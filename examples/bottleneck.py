"""A loader and a training step to look into: photos in folders, and a small ResNet.

fastlab synth data/photos --classes 10 --per-class 100
fastlab bottleneck examples/bottleneck.py:make_loader --step examples/bottleneck.py:train_step
"""

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

FOLDER = "data/photos/train"
WIDTH = 8


class Block(nn.Module):
    """Halves the image; takes [b, inputs, H, W], returns [b, outputs, H/2, W/2]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


torch.set_num_threads(1)  # on a CPU: one core for the step, another for the worker
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
model = nn.Sequential(
    Block(3, WIDTH),
    Block(WIDTH, 2 * WIDTH),
    Block(2 * WIDTH, 4 * WIDTH),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(4 * WIDTH, 10),
).to(device)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)


def make_loader() -> DataLoader:
    """Batches of float32 [64, 3, 32, 32] and int64 [64]."""
    augment = transforms.Compose(
        [
            transforms.ColorJitter(0.4, 0.4, 0.4, 0.1),
            transforms.RandomResizedCrop(32),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
        ]
    )
    return DataLoader(ImageFolder(FOLDER, augment), 64, shuffle=True, num_workers=1)


def train_step(batch: list[torch.Tensor]) -> None:
    images, labels = (part.to(device, non_blocking=True) for part in batch)
    nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()
    optimizer.zero_grad()
