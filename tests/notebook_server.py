"""Runs notebooks one after the other, each in a process of its own. Half of a notebook's time would go into importing the same libraries,
so a process imports them once and forks for every notebook; of the package it imports only what `import omnilab` does."""
import importlib, json, os, sys, traceback

HEAVY = 'omnilab.train.pretrain', 'omnilab.lab', 'peft', 'datasets', 'ipywidgets', 'matplotlib.pyplot', 'nbdev.test'


def forked(job): # exit status and CPU seconds of a process that did it
    pid = os.fork()
    if not pid:
        try: code = job()
        except BaseException: traceback.print_exc(); code = 1
        sys.stdout.flush(); sys.stderr.flush(); os._exit(code)
    _, status, used = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime


def libraries(file): # modules from elsewhere that the package imports, in their order, into a file
    for m in HEAVY: importlib.import_module(m)
    file.write_text(json.dumps([m for m in sys.modules if m.partition('.')[0] not in ('omnilab', '__main__')]))
    return 0


def notebook(path, skip, seconds, env, cwd, out):
    from nbdev.test import test_nb
    os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1); os.dup2(1, 2)
    os.environ.clear(); os.environ.update(env); os.chdir(cwd)
    return int(not test_nb(path, skip_flags=skip, cell_timeout=seconds)[0])


if __name__ == '__main__':
    import tempfile
    from pathlib import Path
    import omnilab      # noqa: F401  stands before whatever imports torchvision
    with tempfile.TemporaryDirectory() as d:
        forked(lambda: libraries(Path(d)/'names'))
        names = json.loads((Path(d)/'names').read_text())
    for m in names:
        try: importlib.import_module(m)
        except Exception: pass      # parts that only their own package may import
    for line in sys.stdin:
        told = json.loads(line)
        print(json.dumps(forked(lambda: notebook(**told))), flush=True)
