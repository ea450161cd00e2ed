"The rules of the house: package and notebooks in step, notebooks clean and short, imports in one direction, nothing private in a file."
import ast, json, re, shutil, subprocess
from pathlib import Path

import pytest, yaml
from conftest import NOTEBOOKS, ROOT, name, run

PACKAGE = ROOT/'omnilab'
notebook = pytest.mark.parametrize('path', NOTEBOOKS, ids=name)


def cells(path): return [(c['cell_type'], ''.join(c['source'])) for c in json.loads(path.read_text())['cells']]


IMPORTS, DEFS = (ast.Import, ast.ImportFrom), (ast.FunctionDef, ast.ClassDef)
HARMLESS = re.compile(r'^[\w.]*(seed|verbosity|disable|filterwarnings|set_num_threads|use)[\w.]*\(')     # may stand beside imports


def is_export(source): return re.match(r'#\|\s*exporti?\b', source)


def code_lines(source): return [l for l in source.splitlines() if l.strip() and not l.startswith('#|')]


def sidebar(contents=None):
    "Every page of the site's sidebar, in its order."
    if contents is None: contents = yaml.safe_load((ROOT/'_quarto.yml').read_text())['website']['sidebar']['contents']
    return [p for c in contents for p in ([c] if isinstance(c, str) else sidebar(c['contents']))]


# --- the package is what the notebooks export

def test_package_in_step(tmp_path):
    "Export into an empty copy; the same files with the same text must come out. Only the package's own __init__.py is written by hand."
    shutil.copy(ROOT/'pyproject.toml', tmp_path)
    shutil.copytree(ROOT/'nbs', tmp_path/'nbs', ignore=shutil.ignore_patterns('.*', '_*', '*.pt', '*.safetensors'))
    (tmp_path/'omnilab').mkdir()
    shutil.copy(PACKAGE/'__init__.py', tmp_path/'omnilab')
    done, _ = run(['-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()'], cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    files = [{p.relative_to(root/'omnilab'): p.read_text() for p in (root/'omnilab').rglob('*.py')} for root in (ROOT, tmp_path)]
    wrong = sorted(str(p) for p in files[0].keys() | files[1].keys() if files[0].get(p) != files[1].get(p))
    assert not wrong, f'not what the notebooks export (make export): {", ".join(wrong)}'


def test_sidebar_lists_every_notebook():
    pages = sidebar()
    assert len(pages) == len(set(pages))
    assert set(pages) == {str(p.relative_to(ROOT/'nbs')) for p in NOTEBOOKS}
    assert (ROOT/'nbs/_quarto.yml').is_symlink() and (ROOT/'nbs/_quarto.yml').resolve() == ROOT/'_quarto.yml'


# --- notebooks are clean, and short enough to be read

@notebook
def test_notebook_is_clean(path):
    from fastcore.nbio import nb2str, read_nb
    from nbdev.clean import clean_nb
    text = path.read_text()
    nb = json.loads(text)
    ids = [c.get('id') for c in nb['cells']]
    assert all(ids) and len(ids) == len(set(ids)), 'cell ids are missing or repeated'
    assert 'has_sd' not in text
    clean = read_nb(path)
    clean_nb(clean)
    assert nb2str(clean) == text, 'nbdev-clean would change it (make export)'


@notebook
def test_notebook_has_the_house_form(path):
    all_cells = cells(path)
    kind, first = all_cells[0]
    assert kind == 'markdown' and re.match(r'# \S.*\n+> \S', first), 'the first cell is the title and a > line'
    assert len(all_cells) <= 80, f'{len(all_cells)} cells; split it by idea'
    for kind, source in all_cells:
        if kind != 'code': continue
        tree = ast.parse('' if re.search(r'^\s*[%!]', source, re.M) else source)
        if is_export(source):
            lines, limit = len(code_lines(source)), 60 if any(isinstance(n, ast.ClassDef) for n in tree.body) else 30
            assert lines <= limit, f'an export cell of {lines} lines: {code_lines(source)[0]}'
        elif 'eval: false' not in source and any(isinstance(n, IMPORTS) for n in ast.walk(tree)):
            wrong = [ast.unparse(n) for n in tree.body if not isinstance(n, IMPORTS + DEFS) and not HARMLESS.search(ast.unparse(n))]
            assert not wrong, f'the docs run this cell alone, because it imports; move out: {wrong[0][:100]}'


# --- imports go up the list

def modules():
    "Module of each notebook that exports, in the sidebar's order, which is the order in which data flows."
    found = [re.search(r'^#\|\s*default_exp (\S+)', '\n'.join(s for _, s in cells(ROOT/'nbs'/p)), re.M) for p in sidebar()]
    return [m[1] for m in found if m]


def imported(path, known):
    "Modules of this package that a file imports, and whether as soon as it is imported itself."
    package, tree = ['omnilab', *path.relative_to(PACKAGE).parent.parts], ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(package[:len(package) - node.level + 1] * (node.level > 0) + [node.module] * bool(node.module))
            names = [f'{base}.{a.name}' for a in node.names]
        else: continue
        for n in names:
            parts = n.split('.')
            if parts[0] != 'omnilab' or parts[1:] == ['__version__']: continue
            yield next((m for i in range(len(parts), 1, -1) if (m := '.'.join(parts[1:i])) in known), n), node in tree.body


def test_imports_go_up_the_list():
    "Between packages always, inside functions too; inside a package for what runs at import."
    order = modules()
    place, packages = {m: i for i, m in enumerate(order)}, list(dict.fromkeys(m.split('.')[0] for m in order))
    wrong = []
    for m in order:
        for other, at_once in imported(PACKAGE/(m.replace('.', '/') + '.py'), place):
            if other not in place: wrong.append(f'{m} imports {other}, which is no module of a notebook'); continue
            a, b = (packages.index(x.split('.')[0]) for x in (m, other))
            if b > a or (a == b and at_once and place[other] > place[m]): wrong.append(f'{m} imports {other}, which comes later')
    assert not wrong, '\n'.join(wrong)


LIGHT = ['omnilab', 'omnilab.settings', 'omnilab.data.media', 'omnilab.data.samples', 'omnilab.train.recipe', 'omnilab.cli']


@pytest.mark.parametrize('module', [m for m in LIGHT if m == 'omnilab' or (ROOT/(m.replace('.', '/') + '.py')).exists()])
def test_light_imports(module, record_property):
    code = f'import sys, {module}; print(*[m for m in ("torch", "transformers", "datasets", "peft", "accelerate", "matplotlib") if m in sys.modules])'
    done, cpu = run(['-c', code])
    record_property('cpu', round(cpu, 2))
    assert done.returncode == 0, done.stderr
    assert not done.stdout.strip(), f'{module} imports {done.stdout.strip()}'


# --- code and files

def test_ruff():
    done, _ = run(['-m', 'ruff', 'check', '--quiet', '--output-format', 'concise', '.'])
    assert done.returncode == 0, done.stdout + done.stderr


def tracked():
    "What is, or would be, committed."
    args = ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard']
    listed = subprocess.run(args, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0: return [ROOT/f for f in listed.stdout.split('\0') if f]
    return [p for p in ROOT.rglob('*') if not re.search(r'/(\.(?!ci|github)\w+|runs|_docs|_proc|build|__pycache__|[^/]*\.egg-info)/', str(p))]


PRIVATE = re.compile('|'.join([r'(?<![\w.$}~])/(?:home|root|work|Users|opt)/[\w.]+', r'https?://[\w.-]*(?:pypi|pythonhosted|anaconda|artifactory|nexus|mirror)[\w.-]*',
                               r'--(?:extra-)?index-url', r'download\.pytorch\.org']))


def test_no_machine_paths_or_registries():
    wrong = []
    for path in tracked():
        if not path.is_file() or path == Path(__file__) or path.stat().st_size > 2_000_000: continue
        try: text = path.read_text()
        except UnicodeDecodeError: continue
        wrong += [f'{path.relative_to(ROOT)}:{n} {m[0]}' for n, line in enumerate(text.splitlines(), 1) for m in PRIVATE.finditer(line)]
    assert not wrong, '\n'.join(wrong)
