"""Floating-point operations of a training step, counted from the shapes: its matrix products and convolutions and
nothing else.

A product of [m, k] and [k, n] counts 2 m k n. In the backward pass each factor that needs a gradient costs as much
again: an activation does if something before it trains, a weight if it trains itself. What no loss reaches is not
counted; nothing is computed twice.
"""


class Value:
    """The result of an operation: what it was made of, whether it needs a gradient, and the operations of both passes."""

    def __init__(self, parents=(), needs=False, forward=0, backward=0):
        self.parents, self.forward, self.backward = parents, forward, backward
        self.needs = needs or any(parent.needs for parent in parents)


def layer(x, rows, inputs, outputs, trains=False, rank=0):
    """A linear layer on `rows` rows (of a convolution: places, with `inputs` the channels times the kernel), with LoRA if `rank`."""
    cost = 2 * rows * inputs * outputs
    low, high = 2 * rows * inputs * rank, 2 * rows * rank * outputs
    backward = cost * (x.needs + trains) + low * (x.needs + 1) + high * 2
    return Value([x], trains or rank > 0, cost + low + high, backward)


def product(a, b, cost):
    return Value([a, b], forward=cost, backward=cost * (a.needs + b.needs))


def join(*values):
    """Sums, concatenations, norms, gates: whatever is no product."""
    return Value(values)


def total(loss):
    """{"forward": operations, "backward": operations} of everything that the value hangs on."""
    seen, waiting = {}, [loss]
    while waiting:
        value = waiting.pop()
        if id(value) not in seen:
            seen[id(value)] = value
            waiting += value.parents
    return {way: sum(getattr(value, way) for value in seen.values()) for way in ("forward", "backward")}


def attention(q, k, v, batch, queries, keys, width):
    cost = 2 * batch * queries * keys * width
    return product(product(q, k, cost), v, cost)


# ---- FLUX ----------------------------------------------------------------------------------------


class Flux:
    """The parts of a FLUX transformer or ControlNet; the model wholly trained, or frozen with LoRA of `rank` on TARGETS."""

    def __init__(self, size, batch, trains=False, rank=0):
        config = size["transformer"]
        self.width = config["num_attention_heads"] * config["attention_head_dim"]
        self.batch, self.image, self.text = batch, batch * size["tokens"][0] * size["tokens"][1], batch * size["text"]
        self.both, self.trains, self.rank, self.text_width = (
            self.image + self.text,
            trains,
            rank,
            config["joint_attention_dim"],
        )

    def linear(self, x, rows, inputs, outputs, rank=0):
        return layer(x, rows, inputs, outputs, self.trains, rank)

    def start(self):
        """Image tokens, text tokens and the embedding of timestep, guidance and pooled text."""
        given, width = Value(), self.width
        embedded = [
            self.linear(self.linear(given, self.batch, n, width), self.batch, width, width) for n in (256, 256, 768)
        ]
        return (
            self.linear(given, self.image, 64, width),
            self.linear(given, self.text, self.text_width, width),
            join(*embedded),
        )

    def project(self, x, rows, rank):
        return [self.linear(x, rows, self.width, self.width, rank) for _ in range(3)]

    def attend(self, q, k, v):
        length = self.both // self.batch
        return attention(q, k, v, self.batch, length, length, self.width)

    def double_block(self, x, text, temb):
        width, streams = self.width, [(x, self.image, self.rank), (text, self.text, 0)]
        modulations = [self.linear(temb, self.batch, width, 6 * width) for _ in streams]
        projected = [self.project(join(s, m), rows, rank) for (s, rows, rank), m in zip(streams, modulations)]
        both, after = self.attend(*(join(*pair) for pair in zip(*projected))), []
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
        return self.linear(
            join(x, self.linear(temb, self.batch, self.width, 2 * self.width)), self.image, self.width, 64
        )

    def controlnet(self, doubles, singles):
        """Residuals of the double and of the single blocks."""
        x, text, temb = self.start()
        x, found, single_found = join(x, self.linear(Value(), self.image, 64, self.width)), [], []
        for _ in range(doubles):
            x, text = self.double_block(x, text, temb)
            found.append(self.linear(x, self.image, self.width, self.width))
        x = join(text, x)
        for _ in range(singles):
            x = self.single_block(x, temb)
            single_found.append(self.linear(x, self.image, self.width, self.width))
        return found, single_found


def at(residuals, number, blocks):
    """The one residual, if any, that is added after block `number` of `blocks`."""
    return [residuals[number // -(-blocks // len(residuals))]] if residuals else []


# ---- Stable Diffusion ----------------------------------------------------------------------------


class UNet:
    """A UNet or the ControlNet of its first half, square latents of `side`."""

    def __init__(self, size, batch, trains=False):
        config = size["unet"]
        self.widths, self.layers, self.text_width = (
            config["block_out_channels"],
            config["layers_per_block"],
            config["cross_attention_dim"],
        )
        self.batch, self.side, self.text, self.trains = batch, size["latent"][0], size["text"], trains
        width = self.widths[0]
        self.temb = self.linear(self.linear(Value(), batch, width, 4 * width), batch, 4 * width, 4 * width)

    def linear(self, x, rows, inputs, outputs):
        return layer(x, rows, inputs, outputs, self.trains)

    def convolve(self, x, side, inputs, outputs, kernel=3):
        """`side`: that of the result."""
        return self.linear(x, self.batch * side * side, inputs * kernel * kernel, outputs)

    def residual(self, x, side, inputs, outputs):
        shift = self.linear(self.temb, self.batch, 4 * self.widths[0], outputs)
        inner = self.convolve(join(self.convolve(x, side, inputs, outputs), shift), side, outputs, outputs)
        return join(inner, x if inputs == outputs else self.convolve(x, side, inputs, outputs, 1))

    def attend(self, x, side, width):
        rows, keys, text = side * side, self.text, Value()
        states = hidden = self.convolve(x, side, width, width, 1)
        for source, count, inputs in ((states, rows, width), (text, keys, self.text_width)):
            source = hidden if source is states else source
            q = self.linear(hidden, self.batch * rows, width, width)
            k, v = (self.linear(source, self.batch * count, inputs, width) for _ in range(2))
            out = attention(q, k, v, self.batch, rows, count, width)
            hidden = join(hidden, self.linear(out, self.batch * rows, width, width))
        inner = self.linear(hidden, self.batch * rows, width, 8 * width)
        hidden = join(hidden, self.linear(inner, self.batch * rows, 4 * width, width))
        return join(x, self.convolve(hidden, side, width, width, 1))

    def down(self, condition=None):
        """Every skip connection with its side and width, and what leaves the middle block."""
        x, side, inputs = self.convolve(Value(), self.side, 4, self.widths[0]), self.side, self.widths[0]
        x = join(x, condition) if condition else x
        skips = [(x, side, inputs)]
        for level, width in enumerate(self.widths):
            for _ in range(self.layers):
                x = self.attend(self.residual(x, side, inputs, width), side, width)
                skips.append((x, side, width))
                inputs = width
            if level < len(self.widths) - 1:
                side //= 2
                x = self.convolve(x, side, width, width)
                skips.append((x, side, width))
        middle = self.attend(self.residual(x, side, inputs, inputs), side, inputs)
        return skips, self.residual(middle, side, inputs, inputs)

    def up(self, skips, x):
        side, inputs = skips[-1][1:]
        for level, width in enumerate(reversed(self.widths)):
            for _ in range(self.layers + 1):
                skip, _, more = skips.pop()
                x = self.attend(self.residual(join(x, skip), side, inputs + more, width), side, width)
                inputs = width
            if level < len(self.widths) - 1:
                side *= 2
                x = self.convolve(x, side, width, width)
        return self.convolve(x, side, inputs, 4)

    def controlnet(self):
        """Residuals for every skip connection and for the middle block. Its condition has eight times the latent's side."""
        channels, side = (16, 32, 96, 256), 8 * self.side
        condition = self.convolve(Value(), side, 3, channels[0])
        for here, after in zip(channels, channels[1:]):
            condition = self.convolve(condition, side, here, here)
            side //= 2
            condition = self.convolve(condition, side, here, after)
        skips, middle = self.down(self.convolve(condition, side, channels[-1], self.widths[0]))
        side, width = skips[-1][1:]
        return [self.convolve(x, s, w, w, 1) for x, s, w in skips], self.convolve(middle, side, width, width, 1)


def of_step(kind, size, batch=1, rank=16):
    """`total` of one update of a training step; optimizer, loss and norms are no products."""
    if kind == "sd15":
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
