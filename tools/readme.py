"README.md from nbs/index.ipynb: markdown as it is, code in fences, links seen from the top."
import json, posixpath, re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r'(\]\(|src=")(?![a-z]+:|#|/)([^)"\s]+)')     # a relative target, in markdown or in HTML


def from_top(match): return match[1] + posixpath.normpath('nbs/' + match[2])


def render(path):
    "The text of README.md."
    parts = [f'<!-- made from {path.relative_to(ROOT)}; edit that and run make export -->']
    for cell in json.loads(path.read_text())['cells']:
        lines = ''.join(cell['source']).splitlines()
        options = [l for l in lines if l.startswith('#|')]
        text = '\n'.join(l for l in lines if not l.startswith('#|')).strip()
        if not text or '#| hide' in options: continue
        parts.append(LINK.sub(from_top, text) if cell['cell_type'] == 'markdown' else f'```python\n{text}\n```')
    return '\n\n'.join(parts) + '\n'


if __name__ == '__main__': (ROOT/'README.md').write_text(render(ROOT/'nbs/index.ipynb'))
