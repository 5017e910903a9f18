"""The embedded digits' own classifier: trained on the real train split, it stands in for Inception where digits are
scored and nothing can be downloaded."""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from sit_atconv.data.digits import Digits
from sit_atconv.runtime.pictures import to_uint8

EPOCHS, BATCH, LR = 30, 64, 2e-3


class DigitsClassifier(nn.Module):
    """uint8 digits (N, 1, 8, 8) -> their streams: pool (N, 64) and logits (N, 10)."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * 16, 64),
            nn.ReLU(),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.features(pixels.float() / 255)
        return {"pool": features, "logits": self.head(features)}


@cache
def train_classifier() -> tuple[DigitsClassifier, float]:
    """The classifier and its accuracy on the 360 held-out digits. The same every time on one machine.

    A process trains it once: copy it before you move or change it.
    """
    train, test = Digits("train"), Digits("test")
    pixels, labels = to_uint8(train.images), torch.tensor(train.labels)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = DigitsClassifier()
        optimizer = torch.optim.Adam(model.parameters(), lr=LR)
        total = EPOCHS * (len(labels) // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=total)
        for _ in range(EPOCHS):
            for batch in torch.randperm(len(labels))[: total // EPOCHS * BATCH].split(BATCH):
                loss = F.cross_entropy(model(pixels[batch])["logits"], labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    model.eval()
    with torch.no_grad():
        found = model(to_uint8(test.images))["logits"].argmax(1)
    return model, float(np.mean(found.numpy() == np.array(test.labels)))
