"The scripts that the two commands and the README stand on"
import gzip,importlib.util,re
from pathlib import Path
import numpy as np
import pytest

def tool(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent.parent/'tools'/f'{name}.py')
    mod = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mod)
    return mod

def test_read_idx(tmp_path):
    x = np.arange(24, dtype=np.uint8).reshape(2,3,4)
    f = tmp_path/'x.gz'
    f.write_bytes(gzip.compress(b'\0\0\x08\x03'+np.array(x.shape, '>u4').tobytes()+x.tobytes()))
    assert (tool('data').read_idx(f)==x).all()
    f.write_bytes(gzip.compress(b'nothing of the kind'))
    with pytest.raises(ValueError, match='not an idx file'): tool('data').read_idx(f)

def test_data_without_fashion(monkeypatch, tmp_path):
    data = tool('data')
    monkeypatch.setattr(data, 'FASHION', tmp_path/'missing')
    name,(x,y),(xv,yv),classes = data.best_there_is()
    assert 'digits' in name and x.shape[1:]==(8,8) and len(x)==len(y) and len(xv)==len(yv)
    assert 0<=x.min() and x.max()<=1 and set(y)|set(yv)==set(range(len(classes)))

def test_readme_links_from_the_root():
    page = '[a](core/x.ipynb) ![b](images/y.png) [c](https://z.org) [d](#e) [f](../g/h.md)'
    assert tool('nb').from_root(page)=='[a](nbs/core/x.ipynb) ![b](nbs/images/y.png) [c](https://z.org) [d](#e) [f](g/h.md)'

def test_readme_links_exist():
    root = Path(__file__).parent.parent
    links = re.findall(r'\]\((?![a-z]+:|[#/])([^)]*)\)', (root/'README.md').read_text(encoding='utf-8'))
    assert links and not [o for o in links if not (root/o).exists()]
