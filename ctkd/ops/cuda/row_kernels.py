"""Kernels that read rows where they lie: statistics, column mass, largest entries, gradients.

A program works through a row in tiles of (R, C) entries, of which each lane has R. The tiles begin
where 16 bytes can be read at once; what comes before and after them is read entry by entry. A
loaded value is widened in the expression that loads it: a narrow one must not be computed with.
"""

# The language gives types and shapes that no annotation can name.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from ctkd.ops.cuda.addressing import row_number, row_start

__all__ = [
    "ALIGNMENT",
    "chosen_entries",
    "chunk_table",
    "chunk_values",
    "clear_rows",
    "column_distances",
    "gradient_rows",
    "greedy_partners",
    "largest",
    "mass_of_columns",
    "pack_scored",
    "statistics",
]

ALIGNMENT = 16
"""Entries by whose multiples all fast reads begin."""

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_EPSILON = tl.constexpr(1e-4)


@triton.jit
def _bounds(start, width, ALIGNED: tl.constexpr, TILE: tl.constexpr):
    """Columns before the first aligned one, and the end of the last whole tile behind it."""
    before = (16 - start % 16) % 16
    if ALIGNED:
        before = before * 0
    before = tl.minimum(before, width).to(tl.int32)
    return before, before + (width - before) // TILE * TILE


@triton.jit
def _lanes(R: tl.constexpr, C: tl.constexpr):
    return tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]


@triton.jit
def _part(tensor, start, columns, stop, other):
    """Columns below an end."""
    return tl.load(tensor + start + columns, mask=columns < stop, other=other).to(tl.float32)


@triton.jit
def _add_sums(x, largest, sums, inverses, T: tl.constexpr, WEIGH: tl.constexpr):
    """Take a tile into the running largest entries and sums of exponentials of lanes.

    With each sum comes one weighted by the entries, if that is wanted.
    """
    new = tl.maximum(largest, tl.max(x, 0))
    # A lane that has seen nothing but -inf must not make a nan of -inf - -inf.
    base = tl.where(new == float("-inf"), 0.0, new)
    added = ()
    for t in tl.static_range(T):
        scale = inverses[t] * _LOG2_E
        before = tl.exp2((largest - base) * scale)
        powers = tl.exp2((x - base[None, :]) * scale)
        if WEIGH:
            weighted = tl.sum(powers * tl.where(powers > 0, x, 0.0), 0)
            weighted += sums[t][1] * before
        else:
            weighted = before
        added = added + ((sums[t][0] * before + tl.sum(powers, 0), weighted),)
    return new, added


@triton.jit
def _add_moments(x, inside, count, mean, squares):
    """Take a tile into the running counts, means and sums of squared deviations of lanes."""
    number = tl.sum(inside.to(tl.float32), 0)
    some = tl.maximum(number, 1.0)
    center = tl.sum(tl.where(inside, x, 0.0), 0) / some
    apart = tl.where(inside, x - center[None, :], 0.0)
    total = tl.maximum(count + number, 1.0)
    gap = tl.where(number > 0, center - mean, 0.0)
    squares += tl.sum(apart * apart, 0) + gap * gap * count * (number / total)
    return count + number, mean + gap * (number / total), squares


@triton.jit
def _moments(tensor, start, width, ALIGNED: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Mean and unbiased standard deviation of a row."""
    before, stop = _bounds(start, width, ALIGNED, R * C)
    lanes = tl.arange(0, C)[None, :]
    count = tl.zeros((C,), tl.float32)
    mean = tl.zeros((C,), tl.float32)
    squares = tl.zeros((C,), tl.float32)
    if not ALIGNED:
        y = _part(tensor, start, lanes, before, 0.0)
        count, mean, squares = _add_moments(y, lanes < before, count, mean, squares)
    all_of_them = tl.full((R, C), True, tl.int1)
    first = tl.multiple_of(start + before, 16)
    for offset in range(0, stop - before, R * C):
        x = tl.load(tensor + first + offset + _lanes(R, C)).to(tl.float32)
        count, mean, squares = _add_moments(x, all_of_them, count, mean, squares)
    columns = stop + _lanes(R, C)
    x = _part(tensor, start, columns, width, 0.0)
    count, mean, squares = _add_moments(x, columns < width, count, mean, squares)
    center = tl.sum(count * mean, 0) / width
    gap = mean - center
    total = tl.sum(squares + count * gap * gap, 0)
    # Of one column there is no deviation: 0 / 0.
    return center, tl.sqrt(total / tl.cast(width - 1, tl.float32))


@triton.jit
def statistics(
    rows, columns_mask, answers, inverses,
    ALIGNED: tl.constexpr, STANDARDIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Log-normalizers (T, N) at temperatures 1 / inverses.

    With a mask (V,), of the columns that it names only. Of standardized rows (T, 4, N): each with
    the row's deviation, its mean, and the mean of its entries by the probabilities.
    """
    T: tl.constexpr = len(inverses)
    R: tl.constexpr = TILE[0]
    C: tl.constexpr = TILE[1]
    tensor = rows.tensor
    number = tl.program_id(0).to(tl.int64)
    row = row_number(rows, number)
    if row >= 0:
        start = row_start(rows, row)
        scale = 1.0
        if STANDARDIZE:
            center, deviation = _moments(tensor, start, rows.width, ALIGNED, R, C)
            scale = 1.0 / (deviation + _EPSILON)
        before, stop = _bounds(start, rows.width, ALIGNED, R * C)
        lanes = tl.arange(0, C)[None, :]
        largest = tl.full((C,), float("-inf"), tl.float32)
        sums = ()
        for _ in tl.static_range(T):
            sums = sums + ((tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)),)
        if not ALIGNED:
            y = _part(tensor, start, lanes, before, float("-inf")) * scale
            if columns_mask is not None:
                some = tl.load(columns_mask + lanes, mask=lanes < before, other=False)
                y = tl.where(some, y, float("-inf"))
            largest, sums = _add_sums(y, largest, sums, inverses, T, STANDARDIZE)
        first = tl.multiple_of(start + before, 16)
        for offset in range(0, stop - before, R * C):
            x = tl.load(tensor + first + offset + _lanes(R, C)).to(tl.float32) * scale
            if columns_mask is not None:
                counts = tl.load(columns_mask + before + offset + _lanes(R, C))
                x = tl.where(counts, x, float("-inf"))
            largest, sums = _add_sums(x, largest, sums, inverses, T, STANDARDIZE)
        columns = stop + _lanes(R, C)
        x = _part(tensor, start, columns, rows.width, float("-inf")) * scale
        if columns_mask is not None:
            counts = tl.load(columns_mask + columns, mask=columns < rows.width, other=False)
            x = tl.where(counts, x, float("-inf"))
        largest, sums = _add_sums(x, largest, sums, inverses, T, STANDARDIZE)
        top = tl.max(largest, 0)
        base = tl.where(top == float("-inf"), 0.0, top)
        count = tl.num_programs(0)
        for t in tl.static_range(T):
            weights = tl.exp2((largest - base) * (inverses[t] * _LOG2_E))
            total = tl.sum(sums[t][0] * weights, 0)
            answer = base * inverses[t] + tl.log2(total) * _LN_2
            if STANDARDIZE:
                place = answers + 4 * t * count + number
                tl.store(place + count, deviation)
                tl.store(place + 2 * count, center)
                tl.store(place + 3 * count, tl.sum(sums[t][1] * weights, 0) / total / scale)
            else:
                place = answers + t * count + number
            tl.store(place, answer)


@triton.jit
def _first_row(sequence, count, which):
    """Number of the first row of a sequence, by bisection."""
    low = 0
    high = count
    while low < high:
        middle = (low + high) // 2
        if tl.load(sequence + middle) < which:
            low = middle + 1
        else:
            high = middle
    return low


@triton.jit
def mass_of_columns(rows, sequence, softmax, mass, count, ALIGNED: tl.constexpr, C: tl.constexpr):
    """Probabilities of some columns, summed over the rows of a sequence in their order."""
    which = tl.program_id(1)
    columns = tl.program_id(0) * C + tl.arange(0, C)
    inside = columns < rows.width
    total = tl.zeros((C,), tl.float32)
    number = _first_row(sequence, count, which)
    go_on = number < count
    while go_on:
        row = row_number(rows, number)
        of_this = tl.load(sequence + number) == which
        if of_this and row >= 0:
            start = row_start(rows, row)
            if ALIGNED:
                start = tl.multiple_of(start, 16)
            place = rows.tensor + start + columns
            x = tl.load(place, mask=inside, other=float("-inf")).to(tl.float32)
            if softmax.deviations is not None:
                x = x / (tl.load(softmax.deviations + number) + _EPSILON)
            normalizer = tl.load(softmax.normalizers + number)
            total += tl.exp2((x * softmax.inverses[0] - normalizer) * _LOG2_E)
        number += 1
        go_on = of_this and number < count
    tl.store(mass + which.to(tl.int64) * rows.width + columns, total, mask=inside)


@triton.jit
def column_distances(
    rows, sequence, softmax, targets, count,
    ALIGNED: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Add L1 distances of columns to targets, over the rows of a sequence in their order."""
    which = tl.program_id(2)
    columns = tl.program_id(0) * C + tl.arange(0, C)
    inside = columns < rows.width
    k = targets.size
    ranks = tl.program_id(1) * K + tl.arange(0, K)
    total = tl.zeros((K, C), tl.float32)
    number = _first_row(sequence, count, which)
    go_on = number < count
    while go_on:
        row = row_number(rows, number)
        of_this = tl.load(sequence + number) == which
        if of_this and row >= 0:
            start = row_start(rows, row)
            if ALIGNED:
                start = tl.multiple_of(start, 16)
            place = rows.tensor + start + columns
            x = tl.load(place, mask=inside, other=float("-inf")).to(tl.float32)
            normalizer = tl.load(softmax.normalizers + number)
            probs = tl.exp2((x * softmax.inverses[0] - normalizer) * _LOG2_E)
            target = tl.load(targets.entries + number * k + ranks, mask=ranks < k, other=0.0)
            total += tl.abs(probs[None, :] - target[:, None])
        number += 1
        go_on = of_this and number < count
    at = (which.to(tl.int64) * k + ranks)[:, None] * rows.width + columns[None, :]
    there = (ranks < k)[:, None] & inside[None, :]
    before = tl.load(targets.distance + at, mask=there, other=0.0)
    tl.store(targets.distance + at, before + total, mask=there)


@triton.jit
def greedy_partners(distance, chosen, has_partner, k, width, K: tl.constexpr, C: tl.constexpr):
    """The nearest free column of each target, in their order; it is closed to those that follow.

    A program works through the targets of a sequence.
    """
    sequence = tl.program_id(0).to(tl.int64)
    ranks = tl.arange(0, K)
    for rank in range(0, k):
        first = distance + (sequence * k + rank) * width
        least = tl.full((), float("inf"), tl.float32)
        nearest = tl.zeros((), tl.int32)
        for begin in range(0, width, C):
            columns = begin + tl.arange(0, C)
            there = columns < width
            some = tl.load(first + columns, mask=there, other=float("inf"))
            of_tile = tl.min(some, 0)
            if of_tile < least:
                least = of_tile
                nearest = tl.min(tl.where(some == of_tile, columns, width), 0)
        place = sequence * k + rank
        tl.store(chosen + place, nearest.to(tl.int64))
        tl.store(has_partner + place, least < float("inf"))
        later = distance + (sequence * k + ranks) * width + nearest
        closed = tl.full((K,), float("inf"), tl.float32)
        tl.store(later, closed, mask=(ranks > rank) & (ranks < k))
        tl.debug_barrier()


@triton.jit
def _keys(x, columns):
    """Integers in the order of values, of equal values the lower column above the higher."""
    # A negative zero is a zero.
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    # Read as integers, negative floats run backwards: flip all but their sign.
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return ordered.to(tl.int64) * 4294967296 + (0x7FFFFFFF - columns).to(tl.int64)


@triton.jit
def largest(rows, ids, values, k, ALIGNED: tl.constexpr, K: tl.constexpr, C: tl.constexpr):
    """Columns and values of the k largest entries, largest first, in one read.

    A tile that holds nothing above the least of the K kept so far changes nothing.
    """
    number = tl.program_id(0).to(tl.int64)
    row = row_number(rows, number)
    if row >= 0:
        start = row_start(rows, row)
        if ALIGNED:
            start = tl.multiple_of(start, 16)
        least = tl.full((), -9223372036854775808, tl.int64)
        kept = tl.full((K,), -9223372036854775808, tl.int64)
        for begin in range(0, rows.width, C):
            columns = begin + tl.arange(0, C)
            inside = columns < rows.width
            place = rows.tensor + start + columns
            x = tl.load(place, mask=inside, other=float("-inf")).to(tl.float32)
            keys = tl.where(inside, _keys(x, columns), -9223372036854775808)
            if tl.max(keys, 0) > least:
                best = tl.topk(keys, K)
                # Of two falling sequences, the larger of each and its mirror are the K largest.
                kept = tl.sort(tl.maximum(kept, tl.flip(best, 0)), descending=True)
                least = tl.min(kept, 0)
        places = tl.arange(0, K)
        ordered = (kept >> 32).to(tl.int32)
        bits = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
        columns = 0x7FFFFFFF - (kept & 4294967295)
        tl.store(ids + number * k + places, columns, mask=places < k)
        tl.store(values + number * k + places, bits.to(tl.float32, bitcast=True), mask=places < k)


@triton.jit
def clear_rows(tensor, index, count, stride, width, C: tl.constexpr):
    """Write zeros to the rows that an index does not name; -1 is the last one."""
    row = tl.program_id(0).to(tl.int64)
    named = tl.zeros((C,), tl.int32)
    for begin in range(0, count, C):
        places = begin + tl.arange(0, C)
        number = tl.load(index + places, mask=places < count, other=-2)
        number = tl.where(number == -1, tl.num_programs(0) - 1, number)
        named |= (number == row).to(tl.int32)
    if tl.max(named, 0) == 0:
        zeros = tl.zeros((C,), tl.float32).to(tensor.dtype.element_ty)
        for begin in range(0, width, C):
            columns = begin + tl.arange(0, C)
            tl.store(tensor + row * stride + columns, zeros, mask=columns < width)


@triton.jit
def _softmaxes(x, columns, scale, terms, number, FORM: tl.constexpr, WHICH: tl.constexpr):
    """Gradient of the log-normalizers of terms: those that are standardized, or the others."""
    gradient = tl.zeros(x.shape, tl.float32)
    for t in tl.static_range(len(FORM.sizes)):
        if FORM.standardize[t] == WHICH:
            term = terms[t]
            y = x * scale if WHICH else x
            # The difference comes first: it cancels large numbers.
            exponent = y * term.inverse - tl.load(term.normalizers + number)
            inside = columns < term.width
            if term.columns is not None:
                counts = tl.load(term.columns + columns, mask=inside, other=0)
                inside = inside & (counts != 0)
            exponent = tl.where(inside, exponent * _LOG2_E, float("-inf"))
            gradient += tl.exp2(exponent) * (tl.load(term.totals + number) * -term.inverse)
    return gradient


@triton.jit
def _named(columns, terms, number, FORM: tl.constexpr, WHICH: tl.constexpr):
    """Weights of all ids that name these columns, in the order of the ids."""
    gradient = tl.zeros(columns.shape, tl.float32)
    for t in tl.static_range(len(FORM.sizes)):
        if FORM.standardize[t] == WHICH:
            term = terms[t]
            for k in range(0, term.size):
                column = tl.load(term.ids + number * term.outer + k)
                weight = tl.load(term.weights + number * term.size + k) * term.inverse
                gradient += tl.where(columns == column, weight, 0.0)
    return gradient


@triton.jit
def _through_deviation(gradient, x, columns, standard):
    """The gradient of a row from that of the row divided by its own deviation."""
    scale, center, slope, width = standard
    return tl.where(columns < width, gradient * scale - (x - center) * slope, 0.0)


@triton.jit
def _known(known, columns):
    """A known gradient times a weight, of which 0 stands for nothing at all."""
    rows, start, weight = known
    inside = columns < tl.where(weight != 0.0, rows.width, 0)
    return weight * tl.load(rows.tensor + start + columns, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _gradient(x, columns, terms, standard, known, number, FORM: tl.constexpr):
    """The gradient of some entries, but for ids."""
    scale = standard[0]
    value = _softmaxes(x, columns, scale, terms, number, FORM, False)
    if FORM.any_standardized:
        turned = _softmaxes(x, columns, scale, terms, number, FORM, True)
        value += _through_deviation(turned, x, columns, standard)
    if known[0].tensor is not None:
        value += _known(known, columns)
    return value


@triton.jit
def gradient_rows(
    rows, out, known, known_weights, terms, standard_width, FORM: tl.constexpr, C: tl.constexpr
):
    """The gradient of a row: a sum over softmax terms, and a weighted known gradient.

    However many ids there are, they cost only themselves: an entry that one names is computed on
    its own, before anything is written, and written last.

    Args:
        rows: Logits, as wide as what is written.
        out: What is written to.
        known: A known gradient, if there is one.
        known_weights: (N,) its weights.
        terms: A `ctkd.ops.cuda.operators.Term` each.
        standard_width: Of rows that are divided by their deviations.
        FORM: A `ctkd.ops.cuda.operators.GradientForm`.
        C: Columns of a tile.
    """
    # Triton before 3.7 loses a number 1 of a tuple in a tuple within a loop, if it is not assigned.
    terms = terms
    tensor = rows.tensor
    number = tl.program_id(0).to(tl.int64)
    row = row_number(rows, number)
    target = row_number(out, number)
    if row >= 0 and target >= 0:
        start = row_start(rows, row)
        out_start = row_start(out, target)
        # How far behind an aligned entry the row begins, on both sides.
        shift = (start % 16).to(tl.int32)
        if FORM.aligned or not FORM.congruent:
            shift = shift * 0
        added = known, start, 0.0
        if known.tensor is not None:
            known_start = row_start(known, row_number(known, number))
            added = known, known_start, tl.load(known_weights + number).to(tl.float32)
        standard = 1.0, 0.0, 0.0, standard_width
        if FORM.any_standardized:
            count = tl.num_programs(0)
            center = tl.zeros((), tl.float32)
            deviation = tl.zeros((), tl.float32)
            change = tl.zeros((), tl.float32)
            for t in tl.static_range(len(FORM.sizes)):
                if FORM.standardize[t]:
                    term = terms[t]
                    # A term may know nothing of the row; those that do know the same deviation.
                    knows = tl.load(term.normalizers + number) != float("inf")
                    place = term.normalizers + count + number
                    deviation = tl.load(place, mask=knows, other=deviation)
                    center = tl.load(place + count, mask=knows, other=center)
                    expected = tl.load(place + 2 * count, mask=knows, other=0.0)
                    change += tl.load(term.totals + number) * -term.inverse * expected
                    for k in range(0, term.size):
                        column = tl.load(term.ids + number * term.outer + k)
                        entry = tl.load(tensor + start + column).to(tl.float32)
                        weight = tl.load(term.weights + number * term.size + k)
                        change += weight * term.inverse * entry
            scale = 1.0 / (deviation + _EPSILON)
            # A constant row has no direction in which its deviation grows.
            spread = deviation * tl.cast(standard_width - 1, tl.float32)
            varies = deviation != 0.0
            slope = tl.where(varies, change * scale * scale / tl.where(varies, spread, 1.0), 0.0)
            standard = scale, center, slope, standard_width
        chosen = ()
        for t in tl.static_range(len(FORM.sizes)):
            if FORM.sizes[t] > 0:
                term = terms[t]
                places = tl.arange(0, FORM.sizes[t])
                there = places < term.size
                some = tl.load(term.ids + number * term.outer + places, mask=there, other=0)
                entries = tl.load(tensor + start + some, mask=there, other=0.0).to(tl.float32)
                value = _gradient(entries, some, terms, standard, added, number, FORM)
                value += _named(some, terms, number, FORM, False)
                if FORM.any_standardized:
                    value += _named(some, terms, number, FORM, True) * standard[0]
                chosen = chosen + ((some, there, value),)
            else:
                chosen = chosen + (0,)
        # The gradient may replace the logits.
        tl.debug_barrier()
        first = start - shift
        out_first = out_start - shift
        if FORM.congruent:
            first = tl.multiple_of(first, 16)
            out_first = tl.multiple_of(out_first, 16)
        # The first tile may begin before the row, and the last one may end behind it.
        columns = tl.arange(0, C) - shift
        inside = (columns >= 0) & (columns < out.width)
        x = tl.load(tensor + first + tl.arange(0, C), mask=inside, other=0.0).to(tl.float32)
        gradient = _gradient(x, columns, terms, standard, added, number, FORM)
        narrow = gradient.to(out.tensor.dtype.element_ty)
        tl.store(out.tensor + out_first + tl.arange(0, C), narrow, mask=inside)
        stop = (out.width + shift) // C * C
        for begin in range(C, stop, C):
            columns = begin - shift + tl.arange(0, C)
            x = tl.load(tensor + first + begin + tl.arange(0, C)).to(tl.float32)
            gradient = _gradient(x, columns, terms, standard, added, number, FORM)
            narrow = gradient.to(out.tensor.dtype.element_ty)
            tl.store(out.tensor + out_first + begin + tl.arange(0, C), narrow)
        if stop >= C:
            columns = stop - shift + tl.arange(0, C)
            inside = columns < out.width
            last = tensor + first + stop + tl.arange(0, C)
            x = tl.load(last, mask=inside, other=0.0).to(tl.float32)
            gradient = _gradient(x, columns, terms, standard, added, number, FORM)
            narrow = gradient.to(out.tensor.dtype.element_ty)
            tl.store(out.tensor + out_first + stop + tl.arange(0, C), narrow, mask=inside)
        tl.debug_barrier()
        for t in tl.static_range(len(FORM.sizes)):
            if FORM.sizes[t] > 0:
                some, there, value = chosen[t]
                narrow = value.to(out.tensor.dtype.element_ty)
                tl.store(out.tensor + out_start + some, narrow, mask=there)


@triton.jit
def chosen_entries(rows, ids, softmax, answers, count, positions, k, C: tl.constexpr):
    """Log-probabilities (N, K) of chosen entries at T temperatures, 0 where there is no row."""
    places = tl.program_id(0) * C + tl.arange(0, C)
    inside = places < count * k
    number = (places // k).to(tl.int64)
    row = tl.load(rows.numbers + number, mask=inside, other=-1)
    there = row >= 0
    sequence, position = number // positions, number % positions
    named = ids.tensor + sequence * ids.outer + position * ids.inner + places % k
    column = tl.load(named, mask=there, other=0)
    start = row_start(rows, row)
    x = tl.load(rows.tensor + start + column, mask=there, other=0.0).to(tl.float32)
    if softmax.deviations is not None:
        x = x / (tl.load(softmax.deviations + number, mask=there, other=1.0) + _EPSILON)
    for t in tl.static_range(len(answers)):
        place = softmax.normalizers + t * softmax.stride + number
        normalizer = tl.load(place, mask=there, other=0.0)
        answer = tl.where(there, x * softmax.inverses[t] - normalizer, 0.0)
        tl.store(answers[t] + places, answer, mask=inside)


@triton.jit
def pack_scored(targets, chunks, answers, positions, size, length, ignored, C: tl.constexpr):
    """Scored positions of a sequence first, in their order, then the others."""
    sequence = tl.program_id(0).to(tl.int64)
    rows, mask, ids, packed_chunks, index, all_rows = answers
    first_target = targets.tensor + sequence * targets.outer
    scored_in_all = tl.zeros((), tl.int32)
    for begin in range(0, positions, C):
        places = begin + tl.arange(0, C)
        inside = places < positions
        target = tl.load(first_target + places * targets.inner, mask=inside, other=ignored)
        scored_in_all += tl.sum((target != ignored).to(tl.int32), 0)
    before = tl.zeros((), tl.int32)
    first = sequence * size
    for begin in range(0, positions, C):
        places = begin + tl.arange(0, C)
        inside = places < positions
        target = tl.load(first_target + places * targets.inner, mask=inside, other=ignored)
        scored = (target != ignored).to(tl.int32)
        rank = before + tl.cumsum(scored, 0)
        to = tl.where(scored != 0, rank - 1, scored_in_all + places - rank)
        kept = inside & (to < size)
        tl.store(rows + first + to, places.to(tl.int64), mask=kept)
        tl.store(mask + first + to, scored != 0, mask=kept)
        tl.store(ids + first + to, tl.where(scored != 0, target, 0), mask=kept)
        number = sequence * length + places
        tl.store(all_rows + first + to, number, mask=kept)
        tl.store(index + first + to, tl.where(scored != 0, number, -1), mask=kept)
        if chunks is not None:
            chunk = chunks.tensor + sequence * chunks.outer + places * chunks.inner
            chunk = tl.load(chunk, mask=inside, other=-1)
            tl.store(packed_chunks + first + to, tl.where(scored != 0, chunk, -1), mask=kept)
        before += tl.sum(scored, 0)


@triton.jit
def _chunk_of(mask, chunks, sequence, places, positions):
    """Chunk of each position of a sequence, -1 for none."""
    inside = places < positions
    scored = tl.load(
        mask.tensor + sequence * mask.outer + places * mask.inner, mask=inside, other=0
    )
    chunk = tl.load(
        chunks.tensor + sequence * chunks.outer + places * chunks.inner, mask=inside, other=-1
    )
    return tl.where(scored != 0, chunk, -1)


@triton.jit
def chunk_table(mask, chunks, values, answers, positions, count, TILE: tl.constexpr):
    """Tokens of each chunk, the positions of its first and its last one, and sums of values.

    A program looks at all positions for a tile of chunks, so that values are added in one order.
    """
    sequence = tl.program_id(1).to(tl.int64)
    numbers = tl.program_id(0) * TILE + tl.arange(0, TILE)
    size = tl.zeros((TILE,), tl.int32)
    first = tl.full((TILE,), positions, tl.int32)
    last = tl.zeros((TILE,), tl.int32)
    total = tl.zeros((TILE,), tl.float64)
    for begin in range(0, positions, TILE):
        places = begin + tl.arange(0, TILE)
        chunk = _chunk_of(mask, chunks, sequence, places, positions)
        # Numbers past the last chunk are not written.
        is_here = (chunk[:, None] == numbers[None, :]) & (chunk >= 0)[:, None]
        size += tl.sum(is_here.to(tl.int32), 0)
        first = tl.minimum(first, tl.min(tl.where(is_here, places[:, None], positions), 0))
        last = tl.maximum(last, tl.max(tl.where(is_here, places[:, None], 0), 0))
        if values is not None:
            added = tl.load(
                values.tensor + sequence * values.outer + places * values.inner,
                mask=places < positions,
                other=0.0,
            ).to(tl.float64)
            total += tl.sum(tl.where(is_here, added[:, None], 0.0), 0)
    inside = numbers < count
    at = sequence * count + numbers
    tl.store(answers[0] + at, size.to(tl.int64), mask=inside)
    tl.store(answers[1] + at, tl.where(size == 0, 0, first).to(tl.int64), mask=inside)
    tl.store(answers[2] + at, last.to(tl.int64), mask=inside)
    if values is not None:
        tl.store(answers[3] + at, total, mask=inside)


@triton.jit
def chunk_values(of_chunks, mask, chunks, answers, positions, TILE: tl.constexpr):
    """The number of each position's chunk, 0 where it is in none."""
    sequence = tl.program_id(1).to(tl.int64)
    places = tl.program_id(0) * TILE + tl.arange(0, TILE)
    chunk = _chunk_of(mask, chunks, sequence, places, positions)
    numbers = of_chunks.tensor + sequence * of_chunks.outer + chunk * of_chunks.inner
    value = tl.load(numbers, mask=chunk >= 0, other=0.0).to(tl.float32)
    tl.store(answers + sequence * positions + places, value, mask=places < positions)
