"""placeholder"""


def activation_bytes(blocks, recomputed, itemsize, graph_mode):
    size = 0.0
    for number, block in enumerate(blocks):
        size += itemsize * block.output * (1.0 if number < recomputed else 15.0)
    return int(size)
