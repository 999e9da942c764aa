"""The studies, by name."""

from studies.definitions import a, c, d, e, g, j

STUDIES = {
    study.name: study for study in (a.STUDY, a.STUDY_B, c.STUDY, d.STUDY, e.STUDY, g.STUDY, j.STUDY)
}
