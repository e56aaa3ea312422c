import numpy as np


def fill_mask(pair, size, draws, crop=None, flip=False):
    m = np.zeros((1, *size), np.float32)
    m[:, : size[0] // 2] = 1
    return m
