r"""Truths with right and wrong answers, made by hand and by tables, for the tests of the reward `math`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from fractions import Fraction

# Truth, answer, and whether the answer has the value of the truth.
Pair = tuple[str, str, bool]


def pairs() -> list[Pair]:
    """All pairs, without repetition."""
    kinds = (integers, fractions, decimals, percentages, roots, powers_of_ten, polynomials, by_hand)
    found = [pair for kind in kinds for pair in kind(random.Random(kind.__name__))]
    return list(dict.fromkeys(found))


def integers(rng: random.Random) -> Iterator[Pair]:
    for digits in (1, 2, 3, 4, 5, 7):
        n = rng.randrange(10 ** (digits - 1), 10**digits)
        for text in (
            f"{n:,}",
            f"{n:,}".replace(",", "{,}"),
            f"{n}.0",
            f"\\${n}",
            f"{n}\\text{{ cm}}",
        ):
            yield str(n), text, True
        yield from ((str(n), f"x={n}", True), (f"x={n}", str(n), True), (str(-n), f"-{n}", True))
        yield from ((str(n), f"{2 * n}-{n}", True), (str(n), f"\\text{{{n}}}", True), (str(n), f"0{n}", True))
        yield from ((str(n), str(n + 1), False), (str(n), str(-n), False), (str(n), f"{n}.5", False))
        yield from (
            (str(n), f"{10 * n}", False),
            (f"x={n}", f"x={n + 1}", False),
            (f"x={n}", f"y={n}", False),
        )


def fractions(rng: random.Random) -> Iterator[Pair]:
    for _ in range(12):
        value = Fraction(rng.randrange(1, 40), rng.choice([3, 7, 8, 9, 11, 20, 25]))
        a, b = value.numerator, value.denominator
        truth = f"\\frac{{{a}}}{{{b}}}"
        for text in (
            f"\\dfrac{{{a}}}{{{b}}}",
            f"\\tfrac{{{a}}}{{{b}}}",
            f"{a}/{b}",
            f"\\frac{{{3 * a}}}{{{3 * b}}}",
        ):
            yield truth, text, True
        yield from ((f"{a}/{b}", truth, True), (f"-{truth}", f"\\frac{{-{a}}}{{{b}}}", True))
        yield from (
            (f"-{truth}", f"-\\frac{{{2 * a}}}{{{2 * b}}}", True),
            (truth, f"$\\frac{{{a}}}{{{b}}}$", True),
        )
        yield from ((truth, f"\\frac{{{a + 1}}}{{{b}}}", False), (truth, f"-\\frac{{{a}}}{{{b}}}", False))
        yield from ((truth, f"\\frac{{{b}}}{{{a}}}", a == b), (truth, f"{a}", b == 1))


def decimals(rng: random.Random) -> Iterator[Pair]:
    for _ in range(10):
        n, places = rng.randrange(1, 9999), rng.choice([1, 2, 3])
        value = Fraction(n, 10**places)
        text = f"{n / 10**places:.{places}f}"
        fraction = f"\\frac{{{value.numerator}}}{{{value.denominator}}}"
        yield from ((text, f"{text}0", True), (text, fraction, True), (fraction, text, True))
        yield from ((f"-{text}", f"-{text}", True), (text, f"{text}\\text{{ m}}", True))
        yield from ((text, f"{text}5", False), (text, f"-{text}", False), (text, f"1{text}", False))


def percentages(rng: random.Random) -> Iterator[Pair]:
    for n in rng.sample(range(1, 99), 8):
        yield from (
            (f"{n}\\%", f"{n}%", True),
            (f"{n}\\%", f"{n}", True),
            (f"{n}\\%", f"\\frac{{{n}}}{{100}}", True),
        )
        yield from (
            (f"0.{n:02}", f"{n}\\%", True),
            (f"{n}\\%", f"{n + 1}\\%", False),
            (f"{n}\\%", f"{n} percent", True),
        )


def roots(rng: random.Random) -> Iterator[Pair]:
    for n in rng.sample([2, 3, 5, 6, 7, 10, 11, 13], 6):
        k = rng.randrange(2, 9)
        yield from (
            (f"{k}\\sqrt{{{n}}}", f"\\sqrt{{{k * k * n}}}", True),
            (f"\\sqrt{{{n}}}", f"\\sqrt{n}", n < 10),
        )
        yield from ((f"\\frac{{1}}{{\\sqrt{{{n}}}}}", f"\\frac{{\\sqrt{{{n}}}}}{{{n}}}", True),)
        yield from (
            (f"{k}\\sqrt{{{n}}}", f"{k}\\cdot\\sqrt{{{n}}}", True),
            (f"{k}\\pi", f"\\pi\\cdot {k}", True),
        )
        yield from ((f"{k}\\sqrt{{{n}}}", f"{n}\\sqrt{{{k}}}", False), (f"{k}\\pi", f"{k}", False))
        yield from ((f"\\frac{{\\pi}}{{{k}}}", f"\\pi/{k}", True), (f"{k}\\pi", f"{k + 1}\\pi", False))


def powers_of_ten(rng: random.Random) -> Iterator[Pair]:
    for exponent in (2, 3, 5, 6, -2, -3):
        n = rng.randrange(11, 99)
        truth, value = f"{n / 10} \\times 10^{{{exponent}}}", Fraction(n, 10) * Fraction(10) ** exponent
        plain = str(value) if value.denominator == 1 else f"{float(value):.6f}"
        yield from ((truth, plain, True), (plain, truth, True), (truth, truth.replace("times", "cdot"), True))
        yield from ((truth, f"{n} \\times 10^{{{exponent - 1}}}", True), (truth, f"{n / 10}", False))
        yield from (
            (truth, truth.replace("10^", "9^"), False),
            (truth, f"{n / 10} \\times 10^{{{exponent + 1}}}", False),
        )


def polynomials(rng: random.Random) -> Iterator[Pair]:
    for _ in range(8):
        a, b = rng.randrange(1, 9), rng.randrange(1, 9)
        expanded = f"x^2+{a + b}x+{a * b}"
        yield from (
            (expanded, f"(x+{a})(x+{b})", True),
            (f"(x+{a})(x+{b})", f"x^{{2}} + {a + b}x + {a * b}", True),
        )
        yield from ((expanded, f"{a * b}+{a + b}x+x^2", True), (expanded, f"(x-{a})(x-{b})", False))
        yield from ((f"y={a}x+{b}", f"y={b}+{a}x", True), (f"y={a}x+{b}", f"y={a}x-{b}", False))
        yield from (
            (f"x>{a}", f"{a}<x", True),
            (f"x>{a}", f"x<{a}", False),
            (f"x\\ge {a}", f"x\\geq {a}", True),
        )
        yield from ((f"{a}+{b}i", f"{b}i+{a}", True), (f"{a}+{b}i", f"{a}-{b}i", False))


def by_hand(rng: random.Random) -> Iterator[Pair]:
    for line in (RIGHT + "\n" + WRONG).splitlines():
        truth, _, answer = line.partition(" ~ ")
        if answer:
            yield truth, answer, line in RIGHT.splitlines()


RIGHT = r"""
(1,2) ~ \left(1,2\right)
(1,2) ~ ( 1, 2 )
(1,2) ~ (1, \frac{4}{2})
(-3,\frac{1}{2}) ~ (-3, 0.5)
(1,2,3) ~ (1, 2, 3)
[0,1) ~ [0, 1)
[0,1) ~ \left[0,1\right)
(-\infty,3] ~ (-\infty, 3]
(0,\infty) ~ (0, +\infty)
[-2,1]\cup[3,4] ~ [-2, 1] \cup [3, 4]
\{1,2,3\} ~ \{3,2,1\}
\{1,2,3\} ~ 1, 2, 3
1,2 ~ 2,1
1,2 ~ 1 and 2
1,2 ~ x=1, x=2
\{-1,1\} ~ \pm 1
\pm\sqrt{2} ~ \sqrt{2}, -\sqrt{2}
1\pm\sqrt{5} ~ 1+\sqrt{5}, 1-\sqrt{5}
\emptyset ~ \{\}
\begin{pmatrix}1&2\\3&4\end{pmatrix} ~ \begin{bmatrix}1&2\\3&4\end{bmatrix}
\begin{pmatrix}1\\2\end{pmatrix} ~ \begin{pmatrix} 1 \\ 2 \end{pmatrix}
\begin{pmatrix}1&0\\0&1\end{pmatrix} ~ \begin{pmatrix}1&0\\0&\frac{2}{2}\end{pmatrix}
\begin{pmatrix}0.5&1\\1&2\end{pmatrix} ~ \begin{pmatrix}\frac12&1\\1&2\end{pmatrix}
1<x<3 ~ (1,3)
x<3 ~ (-\infty,3)
x\le 3 ~ x \leq 3
x\neq 2 ~ x \ne 2
-2\le x\le 5 ~ -2 \leq x \leq 5
2x+3y=5 ~ 3y+2x=5
y=2x+1 ~ 2x+1
f(x)=x^2 ~ x^2
x^2+y^2=1 ~ y^2+x^2=1
3+4i ~ 4i+3
\frac{1+i}{2} ~ \frac12+\frac{i}{2}
\text{Monday} ~ Monday
Monday ~ \text{Monday}
\text{no solution} ~ \text{No solution}
B ~ \text{B}
(B) ~ B
\text{(B)} ~ B
90^\circ ~ 90
90 ~ 90^{\circ}
5\text{ cm} ~ 5
5\text{ cm}^2 ~ 5
12\text{ square units} ~ 12
5 ~ 5 \text{ apples}
30\text{ minutes} ~ 30
\$12.50 ~ 12.5
\$12.50 ~ \$12.50
2^{10} ~ 1024
2^{-3} ~ \frac{1}{8}
\sqrt[3]{8} ~ 2
\sqrt{16} ~ 4
5! ~ 120
\binom{5}{2} ~ 10
\log_2 8 ~ 3
\ln e ~ 1
e^2 ~ e^{2}
\sin\frac{\pi}{6} ~ \frac12
|{-3}| ~ 3
\frac{x}{2} ~ \frac12 x
\frac{x+1}{x} ~ 1+\frac1x
a+b ~ b+a
2ab ~ 2 a b
(a+b)^2 ~ a^2+2ab+b^2
x^2-1 ~ (x-1)(x+1)
\frac{x^2-1}{x-1} ~ x+1
\frac{\sqrt{3}}{3} ~ \frac{1}{\sqrt{3}}
3\sqrt{2}+1 ~ 1+3\sqrt2
\frac{3\pi}{4} ~ \frac{3}{4}\pi
10\pi\text{ cm} ~ 10\pi
0.333333 ~ \frac13
\frac{1}{3} ~ 0.3333333
3\frac{1}{2} ~ 3.5
3\frac{1}{2} ~ \frac72
-2\frac{1}{3} ~ -\frac73
2:3 ~ \frac23
.5 ~ 0.5
\frac12 ~ 0.5
\frac{12}{5} ~ 2.4
\infty ~ +\infty
-\infty ~ - \infty
1,234,567 ~ 1234567
1{,}000{,}000 ~ 1,000,000
\mathbf{42} ~ 42
\boxed{42} ~ 42
x = 5 ~ 5
\left(\frac{1}{2}, 3\right) ~ (0.5, 3)
\left\{ 1, 2 \right\} ~ \{1,2\}
"""
WRONG = r"""
(1,2) ~ (2,1)
(1,2) ~ (1,3)
(1,2) ~ 1
(1,2,3) ~ (1,2)
[0,1) ~ (0,1]
[0,1) ~ [0,1]
(-\infty,3] ~ (-\infty,3)
[-2,1]\cup[3,4] ~ [-2,4]
\{1,2,3\} ~ \{1,2\}
\{1,2\} ~ \{1,2,3\}
1,2 ~ 1
\pm 1 ~ 1
\begin{pmatrix}1&2\\3&4\end{pmatrix} ~ \begin{pmatrix}1&2\\4&3\end{pmatrix}
\begin{pmatrix}1&2\\3&4\end{pmatrix} ~ \begin{pmatrix}1&3\\2&4\end{pmatrix}
\begin{pmatrix}1\\2\end{pmatrix} ~ \begin{pmatrix}1&2\end{pmatrix}
1<x<3 ~ (1,4)
x\le 3 ~ x<3
x\neq 2 ~ x=2
2x+3y=5 ~ 2x+3y=6
x^2+y^2=1 ~ x^2-y^2=1
3+4i ~ 3
2i ~ 2
\text{Monday} ~ \text{Tuesday}
\text{no solution} ~ 0
B ~ C
\text{(B)} ~ (A)
90^\circ ~ 60^\circ
5\text{ cm} ~ 6\text{ cm}
\$12.50 ~ 12.05
2^{10} ~ 1000
\sqrt{16} ~ 8
5! ~ 5
\log_2 8 ~ 8
\sin\frac{\pi}{6} ~ \frac{\sqrt3}{2}
\frac{x}{2} ~ \frac{2}{x}
(a+b)^2 ~ a^2+b^2
x^2-1 ~ (x-1)^2
3\sqrt{2}+1 ~ 3\sqrt{3}
\frac{3\pi}{4} ~ \frac{4\pi}{3}
\pi ~ 3.14
\frac{1}{3} ~ 0.33
3\frac{1}{2} ~ \frac32
-2\frac{1}{3} ~ -\frac53
2:3 ~ \frac32
\frac12 ~ 0.05
\infty ~ -\infty
1,234,567 ~ 1,234,568
\left(\frac{1}{2}, 3\right) ~ (3, 0.5)
e^2 ~ 2e
\ln 2 ~ \log_2 e
x+y ~ x-y
a ~ b
f(x)=x^2 ~ x^3
"""
# Where math-verify 0.9, called directly, is wrong, and the reward is right.
MENDED: list[Pair] = [
    ("3 1/2", "3.5", True),
    ("3 1/2", "2", False),
    ("-2 3/4", r"-\frac{11}{4}", True),
    ("1.5e3", "1500", True),
    ("2.5e-2", "0.025", True),
    (r"1\,000", "1000", True),
    ("1000", r"1\,000", True),
    ("1 234", "1234", True),
    ("pi/2", r"\frac{\pi}{2}", True),
    (r"0.\overline{3}", r"\frac13", True),
    (r"0.1\overline{6}", r"\frac16", True),
    (r"\sqrt{2}", "\u221a2", True),
    ("x^2", "x\u00b2", True),
    (r"\frac12", "\u00bd", True),
    ("12", "\uff11\uff12", True),
    ("42", "42.", True),
    ("90", "90\u00b0", True),
    ("5", "\u200f5", True),
    ("(1,2)", r"\langle 1,2\rangle", True),
    ("72", "72 dollars", True),
    ("72", r"\text{72 dollars}", True),
    (r"\emptyset", r"\varnothing", True),
    ("2i", r"2\cdot i", True),
    (r"\binom52", "10", True),
    ("true", "True", True),
    ("0.0000001", "0.0000002", False),
    ("20", "\u20ac20", True),
    ("1500", "1.5 x 10^3", True),
]
# Where math-verify is wrong and the reward agrees with it.
KNOWN_FAULTS: list[Pair] = [
    ("12_5", "12", False),
    (r"5\text{ cm}", r"5\text{ m}", False),
    ("10:30", r"\frac13", False),
    (r"9\%", "9", False),
    (r"\{1,2\}", "(1,2)", False),
    (r"\pi", "3.14159265", False),
    ("a", "A", False),
    ("Evelyn", "nlyevE", False),
    (r"(-\infty,3)", "x<3", True),
    ("3+4i", r"3+4\mathrm{i}", True),
    (r"\sqrt{-1}", "i", True),
    (r"e^{i\pi}", "-1", True),
    ("3 million", "3000000", True),
    (r"30\text{ minutes}", r"\frac12\text{ hour}", True),
    (r"\overline{AB}", "AB", True),
]
