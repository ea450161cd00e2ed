"""The site without Quarto: run the notebooks, let nbdev add signatures and links, render with mkdocs, check every link.

python tools/docs.py [--force] [--serve]     -> _docs/index.html; a broken link is one line, and a non-zero exit
"""
import hashlib, json, os, posixpath, re, shutil, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml
from tqdm import tqdm
from markdown.extensions.toc import slugify, unique
from omnilab._modidx import d as modidx

ROOT = Path(__file__).resolve().parents[1]
NBS, SITE, BUILD = ROOT/'nbs', ROOT/'_docs', ROOT/'build/docs'      # notebooks, result, what is made on the way
RAN, PAGES = BUILD/'nbs', BUILD/'pages'                             # notebooks with their outputs; the same as mkdocs reads them
RUN = 'import sys; from nbdev.test import test_nb; sys.exit(not test_nb(sys.argv[1], skip_flags=["slow", "gpu", "network"], save=True)[0])'
SYMBOLS = sorted({s.removeprefix(m + '.') for m, syms in modidx['syms'].items() for s in syms})


def html_name(path): return re.sub(r'(^|/)\d+\w?_([^/]*)$', r'\1\2', str(path)).replace('.ipynb', '.html')      # as nbdev names pages


def run_notebook(path):
    "A copy with outputs, made again only when the notebook changed; exported cells keep their source on the page. The error, if any."
    source, copy = path.read_text(), RAN/path.relative_to(NBS)
    stamp, digest = copy.with_suffix('.sha'), hashlib.sha256(source.encode()).hexdigest()
    if copy.exists() and stamp.exists() and stamp.read_text() == digest: return
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text(re.sub(r'"#\| ?export\\n",(?!\s+"if __name__)', r'"#| exports\\n",', source))
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1', 'MPLBACKEND': 'module://matplotlib_inline.backend_inline'}
    done = subprocess.run([sys.executable, '-c', RUN, copy], cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode: return f'{path.relative_to(ROOT)} does not run: {done.stderr.strip().splitlines()[-1]}'
    stamp.write_text(digest)


def run_all():
    "Copies of all notebooks, and of the pictures and styles that they name; the errors."
    for old in RAN.rglob('*.*'):
        if old.suffix != '.sha' and not (NBS/old.relative_to(RAN)).exists(): old.unlink()
    files = [p for p in NBS.rglob('*.*') if p.is_file() and not p.is_symlink() and '.ipynb_checkpoints' not in p.parts]
    for p in files:
        if p.suffix in ('.ipynb', '.yml'): continue
        (RAN/p.relative_to(NBS)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(p, RAN/p.relative_to(NBS))
    books = [p for p in files if p.suffix == '.ipynb']
    bar = tqdm(desc='notebooks', total=len(books), unit='')
    with ThreadPoolExecutor(2) as pool: return [e for e in pool.map(lambda p: (run_notebook(p), bar.update())[0], books) if e]


def heading(cell):
    "In place of nbdev's signature (the source below says the same): a title, with the anchors that links to it and its methods use."
    sym = re.search(r'show_doc\((.*?)\)', ''.join(cell['source']))[1]
    anchors = ''.join(f'<a id="{s.lower()}"></a>' for s in SYMBOLS if s == sym or s.startswith(sym + '.'))
    return dict(cell_type='markdown', id=cell['id'], source=f'### {sym}\n{anchors}')


def page(nb, at):
    "A processed notebook as mkdocs-jupyter reads it: valid, without Quarto's words, links to pages and relative."
    cells, used = [], set()

    def titled(m):      # plain words, and the anchor that the page's table of contents points at
        text = m[2].replace('`', '')
        return f'{m[1]}{text} <a id="{unique(slugify(text, "-"), used)}"></a>'

    for c in nb['cells']:
        if c['cell_type'] == 'raw':
            front = yaml.safe_load(''.join(c['source']).strip().strip('-'))
            c.update(cell_type='markdown', source=f'# {front["title"]}\n> {front["description"]}')
        if c.pop('has_sd', False): c = heading(c)
        c['metadata'], source = {}, ''.join(c['source'])
        if c['cell_type'] == 'code':
            if re.search(r'^#\| *echo: *false', source, re.M): c['metadata']['tags'] = ['no-input']
            shown = [o for o in c.get('outputs', []) if o.get('name') != 'stderr']          # progress bars are for who waits
            c.update(execution_count=None, outputs=shown, source=re.sub(r'^#\|.*\n?', '', source, flags=re.M))
        else:
            source = re.sub(r'^(#+ )(.*)', titled, source, flags=re.M)
            source = re.sub(r'(\]\()([^)\s:]+\.ipynb)', lambda m: m[1] + html_name(m[2]), source)
            c['source'] = re.sub(r'\]\(/([^)]*)\)', lambda m: f']({posixpath.relpath(m[1], at.parent.as_posix())})', source)
        if c['source'].strip() or c.get('outputs'): cells.append(c)
    return {**nb, 'cells': cells, 'metadata': {'kernelspec': nb['metadata'].get('kernelspec', {})}}


def write_pages():
    from nbdev.serve import proc_nbs
    os.chdir(ROOT)
    os.environ['PYTHONWARNINGS'] = 'ignore'
    try: made = Path(proc_nbs(str(RAN.relative_to(ROOT)), n_workers=2, force=True))
    except Exception as e: sys.exit(f'nbdev: {" ".join(str(e).split())[:300]}')
    shutil.rmtree(PAGES, ignore_errors=True)
    for p in made.rglob('*.*'):
        if not p.is_file() or p.suffix in ('.yml', '.sha'): continue
        to = PAGES/html_name(p.relative_to(made)).replace('.html', '.ipynb') if p.suffix == '.ipynb' else PAGES/p.relative_to(made)
        to.parent.mkdir(parents=True, exist_ok=True)
        if p.suffix == '.ipynb': to.write_text(json.dumps(page(json.loads(p.read_text()), p.relative_to(made))))
        else: shutil.copy(p, to)


def nav(contents):
    "The Quarto sidebar as mkdocs navigation."
    for c in contents:
        if isinstance(c, dict): yield {c['section']: list(nav(c['contents']))}
        else:
            at = html_name(c).replace('.html', '.ipynb')
            yield {json.loads((PAGES/at).read_text())['cells'][0]['source'].split('\n')[0].split('<a')[0].strip('# '): at}


def render():
    quarto = yaml.safe_load((ROOT/'_quarto.yml').read_text())['website']
    jupyter = dict(execute=False, include_requirejs=False, ignore_h1_titles=False, remove_tag_config=dict(remove_input_tags=['no-input']))
    theme = dict(name='material', font=False, features=['navigation.sections', 'navigation.footer', 'toc.follow'])
    config = dict(site_name='omnilab', docs_dir=str(PAGES), site_dir=str(SITE), use_directory_urls=False, nav=list(nav(quarto['sidebar']['contents'])),
                  theme=theme, extra_css=['styles.css'], plugins=['search', {'mkdocs-jupyter': jupyter}])
    (BUILD/'mkdocs.yml').write_text(yaml.safe_dump(config, sort_keys=False))
    words = [sys.executable, '-m', 'mkdocs', 'build', '--quiet', '--clean', '-f', BUILD/'mkdocs.yml']
    done = subprocess.run(words, cwd=BUILD, capture_output=True, text=True)      # its cache lands there, too
    if done.returncode: sys.exit(done.stderr[-3000:])


class Links(HTMLParser):
    "What a page points at, and the anchors that it has."
    def __init__(self, text):
        super().__init__()
        self.targets, self.anchors = set(), {''}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.targets |= {a[k] for k in ('href', 'src') if a.get(k)}
        self.anchors |= {a[k] for k in ('id', 'name') if a.get(k)}


def broken():
    "Every internal link or picture that leads nowhere, a line each."
    pages = {p.resolve(): Links(p.read_text()) for p in SITE.rglob('*.html') if p.name != '404.html'}
    for at, links in sorted(pages.items()):
        for target in sorted(links.targets):
            url = urlsplit(target)
            if url.scheme or url.netloc: continue
            to = (at.parent/unquote(url.path)).resolve() if url.path else at
            if not to.is_file() or (to in pages and unquote(url.fragment) not in pages[to].anchors): yield f'{at.relative_to(SITE)}: broken link {target}'


if __name__ == '__main__':
    if '--force' in sys.argv: shutil.rmtree(BUILD, ignore_errors=True)
    wrong = run_all()                       # minutes for what changed; nothing for the rest
    print('signatures and links of all pages: some minutes', file=sys.stderr)
    write_pages()
    print('pages', file=sys.stderr)
    render()
    wrong += broken()
    print('\n'.join(wrong) or f'{len(list(SITE.rglob("*.html")))} pages, every link resolves: {SITE.relative_to(ROOT)}/index.html')
    if wrong: sys.exit(1)
    if '--serve' in sys.argv: subprocess.run([sys.executable, '-m', 'http.server', '8000', '--bind', '127.0.0.1', '-d', SITE])
