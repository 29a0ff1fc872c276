"""The splitter selection network one row at a time: lanes in Python lists, then dense layer matrices."""

from references_networks import through


def cascade(lanes):
    """Layers of (higher, lower): of each block of the list, its first half against its second."""
    half = 1
    while 2 * half < len(lanes):
        half *= 2
    layers = []
    while half >= 1 and len(lanes) > 1:
        pairs = [(i, i + half) for i in range(len(lanes) - half) if i % (2 * half) < half]
        layers.append([(lanes[i], lanes[j]) for i, j in pairs])
        half //= 2
    return layers


def splitter_pairs(n, k):
    """Layers of (lower, higher) wires, the largest to wire n - 1."""
    above = [0] * n  # how many are known to be no smaller than what lies on a lane
    layers = []
    for settled in range(k):
        for rank in range(
            k - 1, settled - 1, -1
        ):  # rounds over the ranks from the last to the next unsettled
            lanes = [lane for lane in range(n) if above[lane] == rank]
            layers += cascade(lanes)
            if len(lanes) > 1:
                for place, lane in enumerate(lanes):
                    above[lane] += 2 ** bin(place).count("1") - 1
    return [[(n - 1 - low, n - 1 - high) for high, low in layer] for layer in layers]


def splitter(scores, k, temperature, **options):
    return through(scores, k, splitter_pairs(len(scores), k), temperature, **options)
