"""The field's claims, tested at small scale: `python -m studies.run --study=a`.

See docs/studies.md.
"""
