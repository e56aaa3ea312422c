"""Floating-point operations of a training step, counted from shapes: its matrix products and convolutions.

A product of [m, k] and [k, n] counts 2 m k n. In the backward pass each factor that needs a gradient costs the same
again: an activation needs one if a weight before it is trained, a weight if it is trained itself. Operations that do
not reach the loss are not counted, and nothing is recomputed.
"""


class Value:
    """A node of the graph: its inputs, whether it needs a gradient, and the operations of both passes."""

    def __init__(self, parents=(), needs=False, forward=0, backward=0):
        self.parents = parents
        self.forward = forward
        self.backward = backward
        self.needs = needs or any(parent.needs for parent in parents)


def layer(x, rows, inputs, outputs, trains=False, rank=0):
    """A linear layer on `rows` rows, with LoRA if `rank` is not 0.

    A convolution is one on as many rows as output positions, with `inputs` the channels times the kernel size.
    """
    cost = 2 * rows * inputs * outputs
    low = 2 * rows * inputs * rank
    high = 2 * rows * rank * outputs
    backward = cost * (x.needs + trains) + low * (x.needs + 1) + high * 2
    return Value([x], trains or rank > 0, cost + low + high, backward)


def product(a, b, cost):
    """A product of two activations."""
    return Value([a, b], forward=cost, backward=cost * (a.needs + b.needs))


def join(*values):
    """Sums, concatenations, norms, gates: everything that is not a product."""
    return Value(values)


def total(loss):
    """{"forward": operations, "backward": operations} of everything that `loss` depends on."""
    seen = {}
    waiting = [loss]
    while waiting:
        value = waiting.pop()
        if id(value) not in seen:
            seen[id(value)] = value
            waiting += value.parents
    return {way: sum(getattr(value, way) for value in seen.values()) for way in ("forward", "backward")}


def attention(q, k, v, batch, queries, keys, width):
    """Scores and weighted sum of all heads together."""
    cost = 2 * batch * queries * keys * width
    return product(product(q, k, cost), v, cost)


# ---- FLUX ----------------------------------------------------------------------------------------


class Flux:
    """A FLUX transformer or ControlNet, trained or frozen, with LoRA of `rank` on the image's attention projections."""

    def __init__(self, size, batch, trains=False, rank=0):
        config = size["transformer"]
        self.width = config["num_attention_heads"] * config["attention_head_dim"]
        self.batch = batch
        self.image = batch * size["tokens"][0] * size["tokens"][1]
        self.text = batch * size["text"]
        self.both = self.image + self.text
        self.trains = trains
        self.rank = rank
        self.text_width = config["joint_attention_dim"]

    def linear(self, x, rows, inputs, outputs, rank=0):
        return layer(x, rows, inputs, outputs, self.trains, rank)

    def start(self):
        """Image tokens, text tokens and the embedding of timestep, guidance and pooled text."""
        given = Value()
        width = self.width
        hidden = [self.linear(given, self.batch, inputs, width) for inputs in (256, 256, 768)]
        embedded = join(*(self.linear(each, self.batch, width, width) for each in hidden))
        image = self.linear(given, self.image, 64, width)
        text = self.linear(given, self.text, self.text_width, width)
        return image, text, embedded

    def project(self, x, rows, rank):
        return [self.linear(x, rows, self.width, self.width, rank) for _ in range(3)]

    def attend(self, q, k, v):
        length = self.both // self.batch
        return attention(q, k, v, self.batch, length, length, self.width)

    def double_block(self, x, text, temb):
        width = self.width
        streams = [(x, self.image, self.rank), (text, self.text, 0)]
        modulations = [self.linear(temb, self.batch, width, 6 * width) for _ in streams]
        projected = [self.project(join(s, m), rows, rank) for (s, rows, rank), m in zip(streams, modulations)]
        both = self.attend(*(join(*pair) for pair in zip(*projected)))
        after = []
        for (stream, rows, rank), modulation in zip(streams, modulations):
            stream = join(stream, modulation, self.linear(both, rows, width, width, rank))
            inner = self.linear(join(stream, modulation), rows, width, 4 * width)
            after.append(join(stream, modulation, self.linear(inner, rows, 4 * width, width)))
        return after

    def single_block(self, x, temb):
        width = self.width
        modulation = self.linear(temb, self.batch, width, 3 * width)
        normed = join(x, modulation)
        attended = self.attend(*self.project(normed, self.both, self.rank))
        inner = self.linear(normed, self.both, width, 4 * width)
        return join(x, modulation, self.linear(join(attended, inner), self.both, 5 * width, width))

    def transformer(self, doubles, singles, residuals=(), single_residuals=()):
        """The prediction, with a ControlNet's residuals added."""
        x, text, temb = self.start()
        for number in range(doubles):
            x, text = self.double_block(x, text, temb)
            x = join(x, *at(residuals, number, doubles))
        x = join(text, x)
        for number in range(singles):
            x = join(self.single_block(x, temb), *at(single_residuals, number, singles))
        modulation = self.linear(temb, self.batch, self.width, 2 * self.width)
        return self.linear(join(x, modulation), self.image, self.width, 64)

    def controlnet(self, doubles, singles):
        """Residuals of the double and of the single blocks."""
        x, text, temb = self.start()
        x = join(x, self.linear(Value(), self.image, 64, self.width))
        residuals = []
        single_residuals = []
        for _ in range(doubles):
            x, text = self.double_block(x, text, temb)
            residuals.append(self.linear(x, self.image, self.width, self.width))
        x = join(text, x)
        for _ in range(singles):
            x = self.single_block(x, temb)
            single_residuals.append(self.linear(x, self.image, self.width, self.width))
        return residuals, single_residuals


def at(residuals, number, blocks):
    """The residuals that are added after block `number` of `blocks`: one or none."""
    return [residuals[number // -(-blocks // len(residuals))]] if residuals else []


# ---- Stable Diffusion ----------------------------------------------------------------------------


class UNet:
    """A UNet, or the ControlNet of its down blocks, on square latents."""

    def __init__(self, size, batch, trains=False):
        config = size["unet"]
        self.widths = config["block_out_channels"]
        self.layers = config["layers_per_block"]
        # Transformer blocks after each residual block of a level.
        blocks = config.get("transformer_layers_per_block", [1] * len(self.widths))
        self.middle_blocks = blocks[-1]
        attends = ["CrossAttn" in name for name in config["down_block_types"]]
        self.blocks = [count if attended else 0 for count, attended in zip(blocks, attends)]
        self.text_width = config["cross_attention_dim"]
        self.batch = batch
        self.side = size["latent"][0]
        self.text = size["text"]
        self.trains = trains
        self.temb = self.embed(self.widths[0])
        if added := config.get("projection_class_embeddings_input_dim"):
            self.temb = join(self.temb, self.embed(added))

    def linear(self, x, rows, inputs, outputs):
        return layer(x, rows, inputs, outputs, self.trains)

    def embed(self, inputs):
        """The embedding of the timestep, or of SDXL's pooled text and image size."""
        width = 4 * self.widths[0]
        return self.linear(self.linear(Value(), self.batch, inputs, width), self.batch, width, width)

    def convolve(self, x, side, inputs, outputs, kernel=3):
        """`side` is that of the output."""
        return self.linear(x, self.batch * side * side, inputs * kernel * kernel, outputs)

    def residual(self, x, side, inputs, outputs):
        shift = self.linear(self.temb, self.batch, 4 * self.widths[0], outputs)
        inner = self.convolve(join(self.convolve(x, side, inputs, outputs), shift), side, outputs, outputs)
        return join(inner, x if inputs == outputs else self.convolve(x, side, inputs, outputs, 1))

    def attend(self, x, side, width, blocks):
        """`x` after a transformer of `blocks` blocks, between two projections."""
        if not blocks:
            return x
        hidden = self.convolve(x, side, width, width, 1)
        for _ in range(blocks):
            hidden = self.block(hidden, side * side, width)
        return join(x, self.convolve(hidden, side, width, width, 1))

    def block(self, hidden, rows, width):
        """A transformer block: attention to itself, attention to the text, feed-forward with a gate."""
        for source, count, inputs in ((None, rows, width), (Value(), self.text, self.text_width)):
            q = self.linear(hidden, self.batch * rows, width, width)
            k, v = (self.linear(source or hidden, self.batch * count, inputs, width) for _ in range(2))
            out = attention(q, k, v, self.batch, rows, count, width)
            hidden = join(hidden, self.linear(out, self.batch * rows, width, width))
        inner = self.linear(hidden, self.batch * rows, width, 8 * width)
        return join(hidden, self.linear(inner, self.batch * rows, 4 * width, width))

    def down(self, condition=None):
        """(value, side, width) of every skip connection, and the output of the middle block."""
        side = self.side
        inputs = self.widths[0]
        x = self.convolve(Value(), side, 4, inputs)
        x = join(x, condition) if condition else x
        skips = [(x, side, inputs)]
        for level, width in enumerate(self.widths):
            for _ in range(self.layers):
                x = self.attend(self.residual(x, side, inputs, width), side, width, self.blocks[level])
                skips.append((x, side, width))
                inputs = width
            if level < len(self.widths) - 1:
                side //= 2
                x = self.convolve(x, side, width, width)
                skips.append((x, side, width))
        middle = self.attend(self.residual(x, side, inputs, inputs), side, inputs, self.middle_blocks)
        return skips, self.residual(middle, side, inputs, inputs)

    def up(self, skips, x):
        side, inputs = skips[-1][1:]
        for level, width in reversed(list(enumerate(self.widths))):
            for _ in range(self.layers + 1):
                skip, _, more = skips.pop()
                residual = self.residual(join(x, skip), side, inputs + more, width)
                x = self.attend(residual, side, width, self.blocks[level])
                inputs = width
            if level > 0:
                side *= 2
                x = self.convolve(x, side, width, width)
        return self.convolve(x, side, inputs, 4)

    def controlnet(self):
        """Residuals for every skip connection and the middle block. Condition images have 8 times the latents' side."""
        channels = (16, 32, 96, 256)
        side = 8 * self.side
        condition = self.convolve(Value(), side, 3, channels[0])
        for here, after in zip(channels, channels[1:]):
            condition = self.convolve(condition, side, here, here)
            side //= 2
            condition = self.convolve(condition, side, here, after)
        skips, middle = self.down(self.convolve(condition, side, channels[-1], self.widths[0]))
        side, width = skips[-1][1:]
        return [self.convolve(x, s, w, w, 1) for x, s, w in skips], self.convolve(middle, side, width, width, 1)


def of_step(kind, size, batch=1, rank=16):
    """`total` of one update of a training step; optimizer, loss and norms have no products."""
    if kind in ("sd15", "sdxl"):
        residuals, middle = UNet(size, batch, trains=True).controlnet()
        unet = UNet(size, batch)
        skips, x = unet.down()
        skips = [(join(skip, residual), *rest) for (skip, *rest), residual in zip(skips, residuals)]
        return total(unet.up(skips, join(x, middle)))
    blocks = size["transformer"]["num_layers"], size["transformer"]["num_single_layers"]
    if kind == "flux_lora":
        return total(Flux(size, batch, rank=rank).transformer(*blocks))
    residuals = Flux(size, batch, trains=True).controlnet(*size["controlnet"])
    return total(Flux(size, batch).transformer(*blocks, *residuals))
