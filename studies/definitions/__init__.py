"""The studies, by name."""

from studies.definitions import a, c, d, e, f, g, h, i, j

_OTHERS = (c.STUDY, d.STUDY, e.STUDY, f.STUDY, g.STUDY, h.STUDY, i.STUDY, j.STUDY)
STUDIES = {study.name: study for study in (a.STUDY, a.STUDY_B, *_OTHERS)}
