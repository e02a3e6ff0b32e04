"""lecture.html: one page with all statements, which needs no other file and no network."""

import base64
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from experiments.files import replacing
from experiments.lecture.statement import ROOT, Result, Statement, figure_path, verdict

TERMS = (
    ("back propagation", "역전파"),
    ("hidden layer", "은닉층"),
    ("activation function", "활성화 함수"),
    ("pooling", "풀링"),
    ("dropout", "드롭아웃"),
    ("patch (kernel)", "패치"),
    ("weight", "가중치"),
    ("product of matrices", "행렬곱"),
    ("elementwise product (∘)", "원소끼리의 곱"),
    ("derivative, slope", "미분, 기울기"),
    ("finite differences", "차에 의한 기울기"),
    ("error (loss E)", "오류"),
    ("size", "크기"),
    ("Kronecker product (⊗)", "크로네커 곱"),
    ("convolution (∗)", "합성곱"),
    ("correlation (⋆)", "상관"),
    ("cross-correlation", "상호상관"),
    ("auto-correlation", "자기상관"),
    ("flip, rotation by 180°", "플립, 180도 회전"),
    ("right triangle", "직각삼각형"),
    ("hill, peak", "산모양, 최고점"),
    ("template matching", "템플릿 매칭"),
    ("similarity", "유사도"),
    ("uniformity", "균일도"),
    ("uncertainty", "불확실성"),
    ("variance", "분산"),
    ("training", "학습, 트레이닝"),
)
"""Pairs of an English and a Korean term, in the lecture's order."""

STYLE = """
:root { color-scheme: light dark; --ground: #fcfcfb; --text: #1f2328; --soft: #5c6570; --line: #dde1e6;
  --card: #ffffff; --link: #1a5fb4; --good: #1a7f37; --bad: #c01c28; --amber: #fff6dd; --amber-line: #e0b252; }
@media (prefers-color-scheme: dark) { :root { --ground: #15181c; --text: #e4e7ea; --soft: #9aa4af; --line: #333a42;
  --card: #1d2126; --link: #7ab4ff; --good: #57c172; --bad: #ff7b72; --amber: #2f2813; --amber-line: #8a6d23; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 4rem; background: var(--ground); color: var(--text);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", "Noto Sans", "Noto Sans CJK KR", "Malgun Gothic",
  "Apple SD Gothic Neo", sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; line-height: 1.35; margin: 0 0 .6rem; }
h2 small { color: var(--soft); font-weight: 600; margin-right: .4rem; white-space: nowrap; }
section > h2 [lang=ko] { display: block; margin-top: .15rem; color: var(--soft); font-size: 1rem; font-weight: 400; }
[lang=ko] { word-break: keep-all; }
a { color: var(--link); }
.soft, figcaption { color: var(--soft); font-size: .92rem; }
nav ol { list-style: none; padding: 0; margin: 1rem 0 2rem; display: grid; gap: .15rem 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
nav a { text-decoration: none; } nav a:hover { text-decoration: underline; }
.badge { background: var(--amber); border: 1px solid var(--amber-line); border-radius: .3rem; padding: 0 .3rem;
  font-size: .8rem; white-space: nowrap; }
section { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1.1rem 1.2rem;
  margin: 0 0 1.5rem; }
blockquote { margin: 0 0 .8rem; padding-left: .8rem; border-left: 3px solid var(--line); color: var(--soft); }
.formula { font-size: 1.12rem; padding: .55rem .8rem; margin: .8rem 0; background: var(--ground); overflow-x: auto;
  border-radius: .4rem; font-family: "STIX Two Text", Cambria, Georgia, "DejaVu Serif", serif; }
.matrix { display: inline-grid; grid-template-columns: repeat(var(--columns), auto); gap: 0 .8rem;
  padding: .05rem .5rem; margin: .2rem .1rem; border: solid; border-width: 0 1.5px; border-radius: .45rem;
  line-height: 1.35; text-align: center; vertical-align: middle; }
.erratum { background: var(--amber); border-left: 3px solid var(--amber-line); padding: .5rem .8rem; margin: .6rem 0;
  border-radius: 0 .4rem .4rem 0; font-size: .95rem; }
figure { margin: 1rem 0; } figcaption { margin-top: .4rem; }
figure img { display: block; width: 100%; height: auto; background: #fff; border-radius: .4rem; padding: .4rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; width: 100%; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number { font-variant-numeric: tabular-nums; } td.required { min-width: 6.6rem; }
.holds { color: var(--good); font-weight: 600; white-space: nowrap; }
.fails { color: var(--bad); font-weight: 700; white-space: nowrap; }
.paths { font-size: .88rem; margin: .9rem 0 0; } .paths a { margin-right: .9rem; white-space: nowrap; }
code { font-size: .92em; }
@media (max-width: 44rem) {
  section { padding: .9rem .8rem; }
  figure img { width: 42rem; max-width: none; }
  figcaption::before { content: "(The figure is wider than the screen and scrolls.) "; }
  thead { display: none; }
  tr { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr) auto; padding: .35rem 0;
    border-bottom: 1px solid var(--line); }
  td, td.required { border: 0; padding: 0 .8rem 0 0; min-width: 0; } td:first-child { grid-column: 1 / -1; }
}
dl.terms { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: .2rem 1.5rem;
  margin: .5rem 0 0; font-size: .95rem; }
dl.terms div { display: flex; justify-content: space-between; border-bottom: 1px solid var(--line); gap: 1rem; }
dl.terms dd { margin: 0; text-align: right; }
"""


def write(path: Path, results: Sequence[tuple[Statement, Result]], facts: Mapping[str, str]) -> None:
    """Write the page to the folder of the figures that it embeds."""
    with replacing(path) as temporary:
        temporary.write_text(page(path.parent, results, facts), encoding="utf-8")


def page(folder: Path, results: Sequence[tuple[Statement, Result]], facts: Mapping[str, str]) -> str:
    """Return the HTML of the page; links to files of the project are relative to `folder`."""
    holding = sum(result.holds for _, result in results)
    contents = "".join(
        f'<li><a href="#{s.name}"><b>§{s.section}</b> {s.title}</a> {_mark(result.holds)}{_badge(s)}</li>'
        for s, result in results
    )
    known = " · ".join(f"{escape(name)} {escape(value)}" for name, value in facts.items())
    terms = "".join(f'<div><dt>{escape(english)}</dt><dd lang="ko">{korean}</dd></div>' for english, korean in TERMS)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>CNN back propagation: the lecture, executed</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>CNN back propagation: the lecture, executed</h1>
<p>Every statement of the lecture (<span lang="ko">10. CNN Back Propagation</span>), in the lecture's order, computed by
<code>python -m experiments.lecture</code>. Each section has the lecture's own words, the claim, the formula, a figure,
and checks that can fail. Where the lecture is wrong, the section has an erratum,
<span class="badge">marked like this</span>.</p>
<p>δ is the derivative of the loss E with respect to a layer's output. ∗ is convolution, with a flipped kernel, and ⋆ is
correlation, without the flip; the lecture writes ∗ for both, and calls the kernel <i>patch</i>. ∘ is the elementwise
product, ⊗ the Kronecker product. The Korean terms are <a href="#terms">listed at the end</a>.</p>
<p><span class="{"holds" if holding == len(results) else "fails"}">{holding} of {len(results)} statements hold.</span>
<span class="soft">{known}</span></p>
</header>
<nav aria-label="Statements"><ol>{contents}</ol></nav>
<main>
{"".join(_section(folder, statement, result) for statement, result in results)}
</main>
<section id="terms"><h2>Terms <span lang="ko">용어</span></h2><dl class="terms">{terms}</dl></section>
</body>
</html>
"""


def _section(folder: Path, statement: Statement, result: Result) -> str:
    image = base64.b64encode(figure_path(statement, folder).read_bytes()).decode()
    errata = "".join(f'<p class="erratum"><b>Erratum {n}.</b> {text}</p>' for n, text in statement.errata)
    rows = "".join(
        f'<tr><td>{escape(c.what)}</td><td class="number">{escape(c.measured)}</td>'
        f'<td class="number required">{escape(c.required)}</td><td>{_mark(c.holds)}</td></tr>'
        for c in result.checks
    )
    script = f"experiments/lecture/{statement.name}.py"
    links = [
        _link(folder, script, script),
        *(_link(folder, where.split(":")[0], where) for where in statement.functions),
    ]
    links.append(_link(folder, statement.test, statement.test))
    return f"""<section id="{statement.name}">
<h2><small>§{statement.section}</small>{statement.title} <span lang="ko">{escape(statement.korean_title)}</span></h2>
<blockquote lang="ko">{escape(statement.korean)}</blockquote>
<p>{statement.claim}</p>
<div class="formula">{statement.formula.replace(",  ", "<br>")}</div>
{errata}
<figure><div class="scroll"><img alt="{escape(result.caption, quote=True)}" src="data:image/png;base64,{image}"></div>
<figcaption>{escape(result.caption)}</figcaption></figure>
<div class="scroll"><table><thead><tr><th>check</th><th>measured</th><th>required</th><th></th></tr></thead>
<tbody>{rows}</tbody></table></div>
<p>Verdict: <span class="{"holds" if result.holds else "fails"}">{verdict(result)}</span></p>
<p class="paths">{" ".join(links)}</p>
</section>
"""


def _link(folder: Path, path: str, text: str) -> str:
    target = Path(os.path.relpath(ROOT / path, folder)).as_posix()
    return f'<a href="{quote(target)}"><code>{escape(text)}</code></a>'


def _badge(statement: Statement) -> str:
    numbers = ", ".join(str(n) for n, _ in statement.errata)
    word = "erratum" if len(statement.errata) == 1 else "errata"
    return f' <span class="badge">{word} {numbers}</span>' if numbers else ""


def _mark(holds: bool) -> str:
    return '<span class="holds">holds</span>' if holds else '<span class="fails">does not hold</span>'
