import io
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from grounding.data.image_source import clean_name
from grounding.data.images import MissingImage, UnreadableImage, open_images
from grounding.data.tars import JoinedFile, index_tar
from grounding.errors import UserError


def picture(width: int, height: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (width % 256, height % 256, 7)).save(buffer, kind)
    return buffer.getvalue()


def tar_bytes(members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def split(folder: Path, data: bytes, cuts: list[int]) -> list[Path]:
    paths = []
    for i, (a, b) in enumerate(zip([0, *cuts], [*cuts, len(data)], strict=True)):
        paths.append(folder / f"coco.tar.part_a{chr(97 + i)}")
        paths[-1].write_bytes(data[a:b])
    return paths


MEMBERS = {
    "coco/a.png": picture(30, 20),
    "./coco/b.jpg": picture(50, 40, "JPEG"),
    "coco/" + "x" * 150 + ".png": picture(9, 8),
}


@pytest.fixture(params=["folder", "tar", "split"])
def sources(request: pytest.FixtureRequest, tmp_path: Path) -> list[Path]:
    if request.param == "folder":
        for name, data in MEMBERS.items():
            path = tmp_path / "root" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return [tmp_path / "root"]
    data = tar_bytes(MEMBERS)
    if request.param == "tar":
        (tmp_path / "coco.tar").write_bytes(data)
        return [tmp_path / "coco.tar"]
    return split(tmp_path, data, [700, 701, 2000])


def test_every_kind_of_source_reads_the_same(sources: list[Path]) -> None:
    store = open_images(*sources)
    assert store.read("/coco/a.png") == MEMBERS["coco/a.png"]
    assert store.size("coco/a.png") == (30, 20)
    assert store.size("coco/b.jpg") == (50, 40)
    assert store.size("coco/" + "x" * 150 + ".png") == (9, 8)
    assert "coco/a.png" in store and "a.png" not in store and "../coco/a.png" not in store
    assert sorted(store) == sorted(clean_name(n) for n in MEMBERS)
    with pytest.raises(MissingImage, match=r"nope\.png"):
        store.read("nope.png")


def test_many_threads_read_the_right_bytes(tmp_path: Path) -> None:
    members = {f"{i}.bin": bytes([i]) * (1000 + i) for i in range(60)}
    split(tmp_path, tar_bytes(members), [5000, 40000])
    store = open_images(tmp_path / "coco.tar")
    with ThreadPoolExecutor(16) as pool:
        names = list(members) * 10
        assert list(pool.map(store.read, names)) == [members[n] for n in names]


def test_paths_exist_for_folders_only(sources: list[Path]) -> None:
    path = open_images(*sources).path("coco/a.png")
    if sources[0].is_dir():
        assert path is not None and path.is_absolute() and path.read_bytes() == MEMBERS["coco/a.png"]
    else:
        assert path is None


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    members=st.dictionaries(
        st.from_regex(r"[a-z]{1,4}(/[a-z0-9é]{1,120}){0,2}", fullmatch=True),
        st.binary(max_size=2000),
        min_size=1,
        max_size=6,
    ),
    form=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
    data=st.data(),
)
def test_the_index_finds_every_member_wherever_it_is_cut(
    members: dict[str, bytes], form: int, data: st.DataObject, tmp_path: Path
) -> None:
    blob = tar_bytes(members, form)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(blob)), max_size=4)))
    for old in tmp_path.iterdir():
        old.unlink()
    file = JoinedFile(split(tmp_path, blob, cuts))
    found = {name: file.read_at(*span) for name, span in index_tar(file, tmp_path).items()}
    assert found == members


def test_a_tar_that_lost_its_end_is_an_error_wherever_it_was_cut(tmp_path: Path) -> None:
    blob = tar_bytes({f"{i}.bin": bytes([65 + i]) * 900 for i in range(3)})
    path = tmp_path / "cut.tar"
    for length in sorted({0, 1, *range(0, 3 * 1536, 256), 3 * 1536, 3 * 1536 + 511}):
        path.write_bytes(blob[:length])
        with pytest.raises(UserError, match=r"cut\.tar"):
            open_images(path)


def test_missing_part_and_cut_end_are_named(tmp_path: Path) -> None:
    members = {f"{i}.bin": bytes([65 + i]) * 3000 for i in range(8)}
    first, middle, last = split(tmp_path, tar_bytes(members), [6000, 13001])
    middle.unlink()
    with pytest.raises(UserError, match=r"part of it is missing|cannot be read as a tar"):
        open_images(first)
    last.unlink()
    with pytest.raises(UserError, match=r"coco\.tar"):
        open_images(first)


def test_compressed_absent_and_empty_sources_are_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.add(__file__, "x")
    (tmp_path / "empty.tar").touch()
    for name in ("a.tar", "empty.tar", "absent.tar"):
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            open_images(tmp_path / name)


def test_the_first_source_that_has_a_name_wins(tmp_path: Path) -> None:
    for folder, size in (("one", 10), ("two", 20)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(picture(size, size))
    (tmp_path / "two/b.png").write_bytes(picture(5, 6))
    store = open_images(tmp_path / "one", tmp_path / "two")
    assert store.size("a.png") == (10, 10)
    assert store.size("b.png") == (5, 6)


def test_what_is_no_image_is_unreadable_not_missing(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"not a picture")
    (tmp_path / "b.png").write_bytes(picture(9, 9)[:20])
    (tmp_path / "c.png").touch()
    for name in ("a.png", "b.png", "c.png"):
        with pytest.raises(UnreadableImage, match=name):
            open_images(tmp_path).size(name)


@given(st.text(max_size=30))
def test_a_clean_name_never_climbs_out(name: str) -> None:
    try:
        clean = clean_name(name)
    except UserError:
        return
    assert not clean.startswith("/") and ".." not in clean.split("/") and clean_name(clean) == clean


def _header(size: bytes, kind: bytes = b"0") -> bytes:
    head = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    head[124:136], head[156:157], head[148:156] = size, kind, b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


@pytest.mark.parametrize("kind", [b"L", b"K", b"x", b"g", b"0"])
@pytest.mark.parametrize("size", [b"\x80" + (2**40).to_bytes(11, "big"), b"\xff" * 11 + b"\0", b"\xff" + b"\xfe" * 11])
def test_a_tar_that_claims_an_absurd_header_is_refused(tmp_path, kind, size):
    (tmp_path / "bad.tar").write_bytes(_header(size, kind) + bytes(2048))
    with pytest.raises(UserError, match="tar file"):
        list(open_images(tmp_path / "bad.tar"))


@given(st.binary(max_size=600), st.integers(0, 511))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_a_tar_or_refused(tmp_path, noise, at):
    whole = bytearray(_header(b"00000000000\0") + bytes(1024))
    whole[at : at + len(noise)] = noise
    (tmp_path / "bad.tar").write_bytes(whole)
    try:
        list(open_images(tmp_path / "bad.tar"))
    except UserError:
        pass
