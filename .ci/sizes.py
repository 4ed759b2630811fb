"""The size limits: files of at most 300 lines, functions of at most 60, and p90 of function length at most 30."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

FILE_LINES, FUNCTION_LINES, P90_LINES = 300, 60, 30


def main() -> int:
    """Print what is too long; 1 if anything is."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py", "*.lua", "*.sh"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    faults, lengths = [], []
    for path in map(Path, listed.stdout.split()):
        if not path.exists():
            continue
        text = path.read_text()
        if (lines := text.count("\n")) > FILE_LINES:
            faults.append(f"{path}: {lines} lines, more than {FILE_LINES}")
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                lengths.append(length)
                if length > FUNCTION_LINES:
                    faults.append(f"{path}:{node.lineno}: {node.name} has {length} lines, more than {FUNCTION_LINES}")
    p90 = sorted(lengths)[len(lengths) * 9 // 10] if lengths else 0
    if p90 > P90_LINES:
        faults.append(f"p90 of function length is {p90} lines, more than {P90_LINES}")
    print("\n".join(faults) or f"sizes: ok ({len(lengths)} functions, p90 {p90} lines)")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
