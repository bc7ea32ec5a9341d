"""What an answer is made of, read without algebra."""

import pytest

from retort.grade.shape import PARTS_MOST, Shape, leaves, shape


def values(*texts: str) -> tuple[Shape, ...]:
    return tuple(Shape("value", text) for text in texts)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x+1", Shape("value", "x+1")),
        ("((x+1))", Shape("value", "x+1")),
        ("(x+1)(x-1)", Shape("value", "(x+1)(x-1)")),
        ("1, -2", Shape("list", parts=values("1", "-2"))),
        ("1; -2", Shape("list", parts=values("1", "-2"))),
        ("(1, 2)", Shape("tuple", parts=values("1", "2"))),
        (r"\langle 1, 2\rangle", Shape("tuple", parts=values("1", "2"))),
        ("[1, 2, 3]", Shape("tuple", parts=values("1", "2", "3"))),
        ("(1, 2]", Shape("interval", "(]", values("1", "2"))),
        (r"\{1, 2\}", Shape("set", parts=values("1", "2"))),
        (r"\{\}", Shape("set")),
        (r"\emptyset", Shape("set")),
        (r"a\pm b", Shape("list", parts=values("a+ b", "a- b"))),
        (r"a\mp b", Shape("list", parts=values("a- b", "a+ b"))),
        (r"\pm a\mp b", Shape("list", parts=values("a- b", "- a+ b"))),
        (r"\{1\pm 2, 3\}", Shape("set", parts=values("1+ 2", "1- 2", "3"))),
        ("x=5", Shape("value", "5")),
        ("x=2+3=5", Shape("value", "5")),
        ("f(x)=2x", Shape("value", "2x")),
        ("x=15, y=-29", Shape("list", parts=values("15", "-29"))),
        ("x+y=5", Shape("relation", "=", values("(5)-(x+y)"))),
        ("x+y>5", Shape("relation", "<", values("(x+y)-(5)"))),
        (r"-2\leq x<7", Shape("interval", "[)", values("-2", "7"))),
        ("7>x>-2", Shape("tuple", parts=values("-2", "7"))),
        (r"x\geq 3", Shape("interval", "[)", values("3", r"\infty"))),
        ("x<3", Shape("tuple", parts=values(r"-\infty", "3"))),
        (
            r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
            Shape("matrix", "2x2", values("1", "2", "3", "4")),
        ),
        (
            r"[\begin{array}{cc}1&2\\3&4\end{array}]",
            Shape("matrix", "2x2", values("1", "2", "3", "4")),
        ),
    ],
)
def test_shapes(text: str, expected: Shape) -> None:
    assert shape(text) == expected


def test_a_union_is_a_list_of_intervals() -> None:
    both = shape(r"(-\infty, 2)\cup[3, 4]")
    assert [part.kind for part in both.parts] == ["tuple", "interval"]
    assert leaves(both) == [r"-\infty", "2", "3", "4"]


@pytest.mark.parametrize(
    "text", ["1<x>2", "<5", "=", "(1, 2", "1, 2)", "]1, 2[", r"\begin{pmatrix}1"]
)
def test_what_makes_no_sense_has_no_shape(text: str) -> None:
    assert shape(text).kind in ("value", "list")


def test_limits() -> None:
    with pytest.raises(ValueError, match="deep"):
        shape("(" * 300 + "1" + ")" * 300)
    with pytest.raises(ValueError, match=f"more than {PARTS_MOST} parts"):
        shape(", ".join(["1"] * (PARTS_MOST + 1)))
