r"""Guides: which loss, how exact, and how it gets into a training that exists already.

* `opdc.guide.choosing`: choosing a method and a behaviour policy
* `opdc.guide.numerics`: what is computed exactly, and how
* `opdc.guide.migration`: from your eager code to opdc
* `opdc.guide.recipes`: a loop of one's own, servers, processes, verl

Notebooks to run, from pictures of the losses to a distillation, are in `python/opdc/examples`.

Each page is a markdown file of this package. These and the pages of the modules, which come from
their docstrings, are built by one command in the root of the repository:

```sh
python -m pdoc -d google --no-show-source -t python/opdc/guide/theme -o site \
    opdc.guide opdc opdc.functional opdc.sampling opdc.teachers opdc.hf opdc.trl opdc.verl
```

`site/index.html` is the beginning. pdoc comes with the extra `test`.
"""
