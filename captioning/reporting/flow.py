"""The pipeline as an inline SVG: a column for each kind of stage, a box for each stage of a matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

from captioning import paths

BOX_WIDTH, BOX_HEIGHT, GAP_X, GAP_Y, MARGIN = 148, 40, 40, 14, 8
MAX_LABEL = 21


@dataclass(frozen=True)
class Node:
    """A stage at (column, row); rows are centred in the drawing."""

    stage: str
    kind: str
    detail: str
    column: int
    row: float


def draw_flow(encoders: Sequence[str], decoders: Sequence[str]) -> str:
    """The flow for these names: an `<svg>` without references to anything outside, coloured by the page's CSS."""
    nodes, edges = _layout(encoders, decoders)
    width = 2 * MARGIN + 7 * BOX_WIDTH + 6 * GAP_X
    height = 2 * MARGIN + (max(node.row for node in nodes.values()) + 1) * (BOX_HEIGHT + GAP_Y) - GAP_Y
    lines = [
        f'<svg class="flow" viewBox="0 0 {width} {height:g}" width="{width}" height="{height:g}" role="img" '
        'aria-label="Flow of the stages, from download to report" xmlns="http://www.w3.org/2000/svg">'
    ]
    lines += [_edge(nodes[start], nodes[end]) for start, end in edges]
    lines += [_box(node) for node in nodes.values()]
    return "\n".join([*lines, "</svg>"])


def _layout(encoders: Sequence[str], decoders: Sequence[str]) -> tuple[dict[str, Node], list[tuple[str, str]]]:
    num_pairs = len(encoders) * len(decoders)
    middle = num_pairs / 2  # the rows of the pairs, and BLIP's below them
    nodes, edges = [Node("download", "download", "", 0, middle), Node("prepare", "prepare", "", 1, middle)], []
    edges.append(("download", "prepare"))
    for e, encoder in enumerate(encoders):
        features = f"features@{encoder}"
        nodes.append(Node(features, "features", encoder, 2, e * len(decoders) + (len(decoders) - 1) / 2))
        edges.append(("prepare", features))
        for d, decoder in enumerate(decoders):
            pair, row = paths.captioner_name(encoder, decoder), e * len(decoders) + d
            previous = features
            for column, kind in ((3, "train"), (4, "generate"), (5, "score")):
                nodes.append(Node(f"{kind}@{pair}", kind, decoder if len(encoders) == 1 else pair, column, row))
                edges.append((previous, f"{kind}@{pair}"))
                previous = f"{kind}@{pair}"
            edges.append((previous, "report"))
    nodes += [Node("blip", "blip", "", 4, num_pairs), Node("score@blip", "score", "blip", 5, num_pairs)]
    nodes.append(Node("report", "report", "", 6, middle))
    edges += [("prepare", "blip"), ("blip", "score@blip"), ("score@blip", "report")]
    return {node.stage: node for node in nodes}, edges


def _corner(node: Node) -> tuple[float, float]:
    return MARGIN + node.column * (BOX_WIDTH + GAP_X), MARGIN + node.row * (BOX_HEIGHT + GAP_Y)


def _edge(start: Node, end: Node) -> str:
    x1, y1 = _corner(start)[0] + BOX_WIDTH, _corner(start)[1] + BOX_HEIGHT / 2
    x2, y2 = _corner(end)[0], _corner(end)[1] + BOX_HEIGHT / 2
    if end.column - start.column > 1:  # along the lower row, clear of the boxes between
        x2_turn = x1 + GAP_X
        return f'<path d="M{x1:g} {y1:g} C{x1 + 20:g} {y1:g} {x1 + 20:g} {y2:g} {x2_turn:g} {y2:g} L{x2:g} {y2:g}"/>'
    bend = (x1 + x2) / 2
    return f'<path d="M{x1:g} {y1:g} C{bend:g} {y1:g} {bend:g} {y2:g} {x2:g} {y2:g}"/>'


def _box(node: Node) -> str:
    x, y = _corner(node)
    centre = x + BOX_WIDTH / 2
    detail = node.detail if len(node.detail) <= MAX_LABEL else node.detail[: MAX_LABEL - 1] + "…"
    name_y = y + (17 if detail else 25)
    text = f'<text x="{centre:g}" y="{name_y:g}" class="kind">{escape(node.kind)}</text>'
    if detail:
        text += f'<text x="{centre:g}" y="{y + 32:g}" class="detail">{escape(detail)}</text>'
    return (
        f"<g><title>{escape(node.stage)}</title>"
        f'<rect x="{x:g}" y="{y:g}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="8" data-kind={quoteattr(node.kind)}/>'
        f"{text}</g>"
    )
