"What makes the environment, the README and the site."
import json, subprocess, sys

from conftest import ROOT

sys.path.insert(0, str(ROOT/'tools'))
import docs, readme  # noqa: E402  the folder is on the path now


def test_readme_in_step():
    assert (ROOT/'README.md').read_text() == readme.render(ROOT/'nbs/index.ipynb'), 'README.md is not what nbs/index.ipynb says (make export)'


def test_readme_links_start_at_the_top():
    "Relative targets, pictures in HTML too, get the notebooks' folder; anchors and addresses stay."
    text = '[a](data/00_x.ipynb) [b](../LICENSE) [c](#here) [d](https://x.org/y) <img src="images/p.svg">'
    want = '[a](nbs/data/00_x.ipynb) [b](LICENSE) [c](#here) [d](https://x.org/y) <img src="nbs/images/p.svg">'
    assert readme.LINK.sub(readme.from_top, text) == want


def test_pages_have_the_names_that_nbdev_gives():
    from nbdev.config import nbpath2html
    for path in ('00_settings.ipynb', 'data/world/01_text.ipynb', 'index.ipynb', 'train/00a_x_y.ipynb'): assert docs.html_name(path) == str(nbpath2html(path))


def test_link_check_finds_what_is_missing(tmp_path, monkeypatch):
    "A missing page, picture and anchor are a line each; what is there, or elsewhere, isn't."
    monkeypatch.setattr(docs, 'SITE', tmp_path)
    (tmp_path/'sub').mkdir()
    (tmp_path/'a.png').touch()
    link = '<a href="{}">x</a>'.format
    (tmp_path/'index.html').write_text('<h1 id="top">x</h1><img src="a.png">' + link('sub/b.html#here') + link('sub/b.html#gone') + link('c.html'))
    (tmp_path/'sub/b.html').write_text('<p id="here"><img src="../z.png">' + link('../index.html#top') + link('#nowhere') + link('https://x.org'))
    want = ['index.html: broken link c.html', 'index.html: broken link sub/b.html#gone', 'sub/b.html: broken link #nowhere', 'sub/b.html: broken link ../z.png']
    assert sorted(docs.broken()) == sorted(want)


def test_a_page_is_plain_and_its_headings_can_be_linked():
    "Quarto's words go, a title comes from the front matter, links lead to pages, equal headings get different anchors."
    md = lambda text: dict(cell_type='markdown', id='i', metadata={}, source=text)
    front = dict(cell_type='raw', id='r', metadata={}, source="---\ntitle: T\ndescription: 'it is'\n---\n")
    code = dict(cell_type='code', id='c', metadata={}, source='#| exports\nx = 1', execution_count=3,
                outputs=[dict(output_type='stream', name=n, text=n) for n in ('stdout', 'stderr')])
    nb = dict(cells=[front, md('## `T` [n](../01_m.ipynb)'), md('see [a](/data/b.html#c)'), code], metadata={}, nbformat=4, nbformat_minor=5)
    made = docs.page(nb, docs.Path('data/00_a.ipynb'))['cells']
    text = [c['source'] for c in made]
    assert text[0].startswith('# T <a id="t"></a>\n> it is')
    assert '../m.html' in text[1] and '`' not in text[1]
    assert text[2] == 'see [a](b.html#c)' and text[3] == 'x = 1' and made[3]['execution_count'] is None
    assert [o['text'] for o in made[3]['outputs']] == ['stdout']           # no progress bars
    assert json.dumps(made)


def test_no_python_is_one_line(tmp_path):
    done = subprocess.run([ROOT/'tools/venv.sh', tmp_path/'python'], capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and 'Python 3.11 or 3.12' in done.stderr
