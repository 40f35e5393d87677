"""Patterns, taps, the order of rows and their partition."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oracle import dense_matrix
from sparsert.errors import DTypeError, FormatError, PatternMismatchError, ShapeError, SparseRTError, ValueRangeError
from sparsert.sparsity.partition import balanced, row_blocks
from sparsert.sparsity.pattern import MAX_EXTENT, Pattern, SparseMatrix, as_sparse, from_csr
from sparsert.sparsity.reorder import ORDERS, loads
from sparsert.sparsity.taps import GROUPS, Window, conv_taps, matmul_taps


def sparse(rng: np.random.Generator, rows: int, cols: int, density: float) -> np.ndarray:
    return np.where(rng.random((rows, cols)) < density, rng.standard_normal((rows, cols)), 0).astype(np.float32)


EXTENTS = [(1, 1), (3, 5), (7, 4), (16, 33), (1, 40), (40, 1), (0, 5), (5, 0), (0, 0)]


@pytest.mark.parametrize("extent", EXTENTS)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_dense_weights_round_trip(extent: tuple[int, int], density: float, rng: np.random.Generator) -> None:
    weight = sparse(rng, *extent, density)
    matrix = as_sparse(weight)
    assert matrix.shape == weight.shape
    assert np.array_equal(matrix.to_dense(), weight)
    assert np.array_equal(matrix.transpose().to_dense(), weight.T)
    pattern = matrix.pattern
    assert pattern.nnz == np.count_nonzero(weight)
    assert (pattern.indptr.dtype, pattern.indices.dtype, matrix.values.dtype) == (np.int64, np.int32, np.float32)
    rows, cols = np.nonzero(weight)
    assert np.array_equal(pattern.row_of, rows)
    assert np.array_equal(pattern.indices, cols)


@pytest.mark.parametrize("extent", EXTENTS)
def test_statistics_are_those_of_the_mask(extent: tuple[int, int], rng: np.random.Generator) -> None:
    mask = sparse(rng, *extent, 0.4) != 0
    per_row = mask.sum(axis=1) if extent[0] else np.zeros(1)
    stats = as_sparse(mask.astype(np.float32)).pattern.stats()
    assert stats[:3] == (*extent, mask.sum())
    assert stats.density == pytest.approx(mask.mean() if mask.size else 0.0)
    assert (stats.row_min, stats.row_max) == (per_row.min(), per_row.max())
    assert (stats.row_mean, stats.row_std) == pytest.approx((per_row.mean(), per_row.std()))
    assert stats.empty_rows == (~mask.any(axis=1)).sum()
    assert stats.empty_cols == (~mask.any(axis=0)).sum()


def test_negative_zero_is_no_entry_and_a_subnormal_is_one() -> None:
    assert as_sparse(np.array([[-0.0, 1e-45, 0.0, 2.0]], np.float32)).pattern.indices.tolist() == [1, 3]


def test_other_float_types_and_strides_are_converted(rng: np.random.Generator) -> None:
    weight = sparse(rng, 6, 8, 0.5).astype(np.float16)
    want = as_sparse(weight.astype(np.float32))
    for form in (weight, weight.astype(np.float64), weight.astype(">f4"), np.asfortranarray(weight)):
        got = as_sparse(form)
        assert got.pattern == want.pattern
        assert np.array_equal(got.values, want.values)
    assert np.array_equal(as_sparse(weight[::-1, ::2]).to_dense(), weight[::-1, ::2])


class Tensor:
    """Something that only speaks DLPack."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


def test_dlpack_is_accepted(rng: np.random.Generator) -> None:
    weight = sparse(rng, 4, 6, 0.5)
    assert np.array_equal(as_sparse(Tensor(weight)).to_dense(), weight)


def csr(**changes: Any) -> tuple[Any, ...]:
    parts = {"data": np.float32([1, 2, 3]), "indices": [1, 0, 2], "indptr": [0, 1, 3], "shape": (2, 3)} | changes
    return tuple(parts[name] for name in ("data", "indices", "indptr", "shape"))


def test_stored_entries_are_the_pattern() -> None:
    """Explicit zeros stay, columns are sorted, duplicates summed - also where the sum is zero."""
    matrix = as_sparse(csr(data=np.float32([0, 5, 2, -2, 1]), indices=[2, 2, 0, 0, 1], indptr=[0, 1, 5]))
    assert matrix.pattern.indptr.tolist() == [0, 1, 4]
    assert matrix.pattern.indices.tolist() == [2, 0, 1, 2]
    assert matrix.values.tolist() == [0, 0, 1, 5]


def test_duplicates_are_summed_exactly() -> None:
    matrix = from_csr(np.float32([1e8, 1, -1e8]), [0, 0, 0], [0, 3], (1, 1))
    assert matrix.values.tolist() == [1.0]


@pytest.mark.parametrize("form", ["csr", "csc", "coo", "bsr", "lil", "dok", "dia"])
def test_scipy_is_read_as_scipy_reads_it(form: str, rng: np.random.Generator) -> None:
    scipy_sparse = pytest.importorskip("scipy.sparse")
    dense = sparse(rng, 8, 12, 0.3)
    matrix = as_sparse(scipy_sparse.csr_matrix(dense).asformat(form))
    assert np.array_equal(matrix.to_dense(), dense)


def test_unsorted_duplicates_agree_with_scipy(rng: np.random.Generator) -> None:
    scipy_sparse = pytest.importorskip("scipy.sparse")
    row, col = rng.integers(0, 9, (2, 300))
    data = rng.standard_normal(300)
    want = scipy_sparse.coo_matrix((data, (row, col)), (9, 9)).tocsr()
    want.sum_duplicates()
    order = np.argsort(row, kind="stable")
    indptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=9))])
    parts = (data[order], col[order], indptr)
    for got in (from_csr(*parts, (9, 9)), as_sparse(scipy_sparse.csr_array(parts, (9, 9)))):
        assert np.array_equal(got.pattern.indptr, want.indptr)
        assert np.array_equal(got.pattern.indices, want.indices)
        assert got.values == pytest.approx(want.data, rel=1e-6)


@pytest.mark.parametrize(
    ("weight", "error", "words"),
    [
        (np.zeros((2, 3, 1), np.float32), ShapeError, "two dimensions, not 3"),
        (np.zeros(4, np.float32), ShapeError, "two dimensions, not 1"),
        (np.zeros((2, 3), np.int32), DTypeError, "not int32"),
        (np.zeros((2, 3), np.complex64), DTypeError, "not complex64"),
        (np.array([["a"]]), DTypeError, "floating point"),
        (np.float32([[1, np.nan], [np.inf, 2]]), ValueRangeError, "2 of 4 values"),
        (np.array([[1e300]]), ValueRangeError, "infinite in float32"),
        (csr(shape=(2, 3, 1)), ShapeError, "two extents, not 3"),
        (csr(shape=(-1, 3)), ValueRangeError, "beyond"),
        (csr(shape=(2, MAX_EXTENT + 1)), ValueRangeError, "beyond"),
        (csr(indices=[1.0, 0.0, 2.0]), FormatError, "integers"),
        (csr(indptr=[0.0, 1.0, 3.0]), FormatError, "integers"),
        (csr(indptr=[0, 3]), FormatError, "rising offset table of 3 entries"),
        (csr(indptr=[1, 1, 3]), FormatError, "rising offset table"),
        (csr(indptr=[0, 4, 3]), FormatError, "rising offset table"),
        (csr(indptr=[0, 1, 2]), FormatError, "from 0 to 3"),
        (csr(data=np.float32([1, 2])), FormatError, "2 values for 3"),
        (csr(data=[1, 2, 3]), DTypeError, "not int64"),
        (csr(indices=[1, 0, 3]), FormatError, "outside 0..2"),
        (csr(indices=[-1, 0, 2]), FormatError, "outside 0..2"),
        (csr(data=np.float32([1, np.inf, 3])), ValueRangeError, "1 of 3 values"),
        (csr(data=np.float32([1, 3e38, 3e38]), indices=[0, 1, 1]), ValueRangeError, "NaN or infinite"),
    ],
)
def test_bad_weights_are_refused(weight: Any, error: type[SparseRTError], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        as_sparse(weight, "the weight")
    assert caught.value.where == "the weight"


def test_a_pattern_cannot_be_written_to() -> None:
    pattern = as_sparse(np.eye(3, dtype=np.float32)).pattern
    for array in (pattern.indptr, pattern.indices):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


DIGEST = "d76a005641d74a9f18db9945db18390c"  # of a 3 x 5 identity


def test_the_digest_is_the_same_everywhere() -> None:
    pattern = as_sparse(np.eye(3, 5, dtype=np.float32)).pattern
    assert pattern.digest == DIGEST
    code = "import numpy as np, sparsert.sparsity.pattern as p; print(p.as_sparse(np.eye(3, 5)).pattern.digest)"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == DIGEST


def test_the_digest_names_the_pattern_and_not_the_values(rng: np.random.Generator) -> None:
    weight = sparse(rng, 5, 9, 0.5)
    pattern = as_sparse(weight).pattern
    again = as_sparse(csr(data=(weight[weight != 0] * 2), indices=np.nonzero(weight)[1], shape=weight.shape,
                          indptr=np.concatenate([[0], np.cumsum((weight != 0).sum(axis=1))]))).pattern  # fmt: skip
    assert again == pattern
    assert hash(again) == hash(pattern)
    assert pattern != "a string"
    wider = [np.pad(weight, ((0, 1), (0, 0))), np.pad(weight, ((0, 0), (0, 1)))]
    others = [weight.T, weight[:, :-1], *wider, np.roll(weight, 1, 1)]
    digests = {pattern.digest, *(as_sparse(other).pattern.digest for other in others)}
    assert len(digests) == 1 + len(others)
    flat = [as_sparse(np.zeros(shape, np.float32)).pattern for shape in ((2, 3), (3, 2), (6, 1))]
    assert len({p.digest for p in flat}) == 3, "the shape belongs to the name"


# ---- refit -----------------------------------------------------------------------------------------------------------


def test_new_values_for_a_pattern(rng: np.random.Generator) -> None:
    weight = sparse(rng, 6, 7, 0.5)
    pattern = as_sparse(weight).pattern
    new = np.where(weight != 0, rng.standard_normal(weight.shape), 0).astype(np.float32)
    rows, cols = np.nonzero(weight)
    new[rows[0], cols[0]] = 0  # a zero inside the pattern is a value
    want = new[rows, cols]
    for form in (new, new.astype(np.float64), as_sparse(new), SparseMatrix(pattern, want)):
        assert np.array_equal(pattern.values_of(form), want)


def test_values_outside_the_pattern_are_refused(rng: np.random.Generator) -> None:
    weight = np.eye(4, dtype=np.float32)
    pattern = as_sparse(weight).pattern
    bad = weight.copy()
    bad[0, 2] = bad[3, 1] = 1e-45
    for form in (bad, as_sparse(bad)):
        with pytest.raises(PatternMismatchError, match="2 nonzeros lie outside the compiled pattern") as caught:
            pattern.values_of(form, "new_weight")
        assert caught.value.where == "new_weight"
    bad[:] = 0
    assert pattern.values_of(bad).tolist() == [0.0] * 4
    with pytest.raises(ShapeError, match="does not fit"):
        pattern.values_of(np.eye(5, dtype=np.float32))
    with pytest.raises(DTypeError):
        pattern.values_of(np.eye(4, dtype=np.int64))


# ---- taps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("extent", [(1, 1), (5, 4), (6, 7), (9, 33), (3, 0), (0, 3)])
@pytest.mark.parametrize("density", [0.0, 0.25, 1.0])
def test_taps_sum_to_the_product(group: int, extent: tuple[int, int], density: float, rng: np.random.Generator) -> None:
    """A tap multiplies ``group`` values with as many input rows, ``pitch`` pitches of the grouped input away."""
    weight = sparse(rng, *extent, density)
    matrix, (rows, cols) = as_sparse(weight), extent
    taps = matmul_taps(matrix.pattern, group)
    packed = taps.pack(matrix.values)
    assert packed.shape == (len(taps), group)
    blocks = -(-cols // group)
    x = rng.standard_normal((blocks * group, 3)).astype(np.float32)
    y = np.zeros((rows, 3))
    np.add.at(y, taps.row, np.einsum("tg,tgn->tn", packed.astype(float), x.reshape(blocks, group, 3)[taps.pitch]))
    assert y == pytest.approx(weight.astype(float) @ x[:cols])
    assert not np.any(taps.plane)
    assert not np.any(taps.offset)
    place = taps.row.astype(np.int64) * max(blocks, 1) + taps.pitch
    assert np.all(np.diff(place) > 0), "by row, then by displacement, and each place once"
    used = taps.source[taps.source >= 0]
    assert np.array_equal(np.sort(used), np.arange(matrix.pattern.nnz)), "every value is used once"
    assert np.all((taps.source >= 0).any(axis=1)), "no tap of zeros alone"


def test_groups_are_ones_twos_and_fours() -> None:
    with pytest.raises(ValueRangeError, match="not 3"):
        matmul_taps(as_sparse(np.eye(3, dtype=np.float32)).pattern, 3)


# ---- the order of rows -----------------------------------------------------------------------------------------------


def clustered(rng: np.random.Generator, kinds: int, each: int, cols: int) -> Pattern:
    """Rows of a few kinds, shuffled: those of a kind share most of their columns."""
    masks = rng.random((kinds, cols)) < 0.1
    mask = np.repeat(masks, each, axis=0) & (rng.random((kinds * each, cols)) < 0.9)
    return as_sparse(rng.permutation(mask).astype(np.float32)).pattern


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("extent", [(0, 4), (1, 1), (5, 0), (7, 30), (30, 7)])
@pytest.mark.parametrize("rows", [1, 4, 28])
def test_orders_are_permutations(name: str, extent: tuple[int, int], rows: int, rng: np.random.Generator) -> None:
    pattern = as_sparse(sparse(rng, *extent, 0.3)).pattern
    order = ORDERS[name](pattern, rows)
    assert np.array_equal(np.sort(order), np.arange(pattern.rows))
    assert np.array_equal(order, ORDERS[name](pattern, rows)), "and the same every time"


def test_natural_order_is_none_and_heavy_rows_come_first() -> None:
    pattern = as_sparse(np.float32([[1, 0, 0], [1, 1, 1], [0, 0, 0], [0, 1, 0], [1, 1, 0]])).pattern
    assert ORDERS["natural"](pattern, 2).tolist() == [0, 1, 2, 3, 4]
    assert ORDERS["count"](pattern, 2).tolist() == [1, 4, 0, 3, 2], "ties in their order"


def brute_loads(pattern: Pattern, order: np.ndarray, rows: int) -> int:
    touched = [pattern.indices[pattern.indptr[r] : pattern.indptr[r + 1]] for r in order]
    return sum(np.unique(np.concatenate(touched[i : i + rows])).size for i in range(0, len(touched), rows))


@pytest.mark.parametrize("rows", [1, 3, 8, 100])
def test_loads_are_distinct_columns_per_block(rows: int, rng: np.random.Generator) -> None:
    pattern = as_sparse(sparse(rng, 20, 31, 0.2)).pattern
    order = rng.permutation(20)
    assert loads(pattern, order, rows) == brute_loads(pattern, order, rows)
    assert loads(as_sparse(np.zeros((3, 3), np.float32)).pattern, np.arange(3), rows) == 0


@pytest.mark.parametrize("seed", range(8))
def test_overlap_finds_clusters(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pattern = clustered(rng, kinds=6, each=8, cols=300)
    found, natural = (loads(pattern, ORDERS[name](pattern, 8), 8) for name in ("overlap", "natural"))
    assert found <= natural
    assert found < 0.5 * natural, "six kinds in blocks of eight: natural order mixes them"


def test_overlap_groups_equal_rows() -> None:
    mask = np.zeros((6, 9), np.float32)
    mask[::2, :4], mask[1::2, 4:] = 1, 1
    order = ORDERS["overlap"](as_sparse(mask).pattern, 3)
    assert [sorted(order[:3].tolist()), sorted(order[3:].tolist())] == [[1, 3, 5], [0, 2, 4]], "the heavier ones first"


# ---- partition -------------------------------------------------------------------------------------------------------


@given(st.integers(0, 500), st.integers(1, 40))
def test_row_blocks_are_few_and_equal(rows: int, limit: int) -> None:
    cuts = row_blocks(rows, limit)
    sizes = np.diff(cuts)
    assert (cuts[0], cuts[-1]) == (0, rows)
    assert len(sizes) == -(-rows // limit)
    assert not rows or (sizes.max() <= limit and sizes.max() - sizes.min() <= 1)


work = st.lists(st.integers(0, 50), max_size=60).map(lambda items: np.array(items, np.int64))


@given(work, st.integers(1, 9))
def test_balanced_runs_cover_everything_in_order(items: np.ndarray, parts: int) -> None:
    cuts = balanced(items, parts)
    assert len(cuts) == parts + 1
    assert (cuts[0], cuts[-1]) == (0, items.size)
    assert np.all(np.diff(cuts) >= 0)


@given(work, st.integers(1, 9))
def test_balanced_shares_miss_the_mean_by_less_than_one_item(items: np.ndarray, parts: int) -> None:
    """Each border lies within half an item of where it should: a share is off by one item at most."""
    cuts = balanced(items, parts)
    shares = [int(items[a:b].sum()) for a, b in pairwise(cuts)]
    heaviest = int(items.max()) if items.size else 0
    assert sum(shares) == items.sum()
    assert all(abs(share - items.sum() / parts) <= heaviest for share in shares)


def test_equal_items_are_cut_equally() -> None:
    assert balanced(np.full(12, 5), 4).tolist() == [0, 3, 6, 9, 12]
    assert balanced(np.array([9, 1, 1, 1, 9]), 3).tolist() == [0, 1, 4, 5]
    assert balanced(np.array([1]), 3).tolist()[-1] == 1


def test_a_dilated_kernel_has_no_more_displacements_than_a_dense_one(rng: np.random.Generator) -> None:
    pattern = as_sparse(dense_matrix(rng, 12, 5 * 9, 0.7)).pattern
    plain, wide = (conv_taps(pattern, Window((3, 3), dilation=(d, d))) for d in (1, 17))
    assert wide.extent == plain.extent == 45
    assert np.array_equal(wide.key, plain.key)
    for taps in (plain, wide):
        plane, pitch, offset = taps.place(taps.key)
        assert np.array_equal(plane, taps.plane)
        assert np.array_equal(pitch, taps.pitch)
        assert np.array_equal(offset, taps.offset)
    assert set(wide.pitch.tolist()) == {0, 17, 34}
