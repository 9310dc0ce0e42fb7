import io
import os
import signal
import threading
import time

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import BadImage, ErrorClass
from pipeline.sandbox import Sandbox

POISONED_CHILD = """
import sys, os, time; sys.path[:0] = [sys.argv[1]]
import pipeline.images as images
real = images.decode_image
def decode(data, limit):
    if data.startswith(b"SEGV"): os.kill(os.getpid(), 11)
    if data.startswith(b"HANG"): time.sleep(60)
    if data.startswith(b"SWELL"): bytearray(20 << 30)
    return real(data, limit)
images.decode_image = decode
from pipeline.sandbox import serve; serve(*map(int, sys.argv[2:]))
"""


def png(seed=0, shape=(40, 50)):
    buffer = io.BytesIO()
    array = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue(), array


def error_of(sandbox, data):
    with pytest.raises(BadImage) as caught:
        sandbox.decode(data, "image")
    return caught.value.error_class


def test_pixels_come_through_unchanged_and_pages_in_order():
    with Sandbox() as sandbox:
        for seed in range(5):
            data, array = png(seed, (40 + 7 * seed, 50))
            assert np.array_equal(sandbox.decode(data, "image")[0][:, :, 0], array)
        buffer = io.BytesIO()
        pages = [Image.fromarray(png(seed)[1]) for seed in range(3)]
        pages[0].save(buffer, "TIFF", save_all=True, append_images=pages[1:])
        found = sandbox.decode(buffer.getvalue(), "image")
        assert [
            np.array_equal(f[:, :, 0], np.asarray(p)) for f, p in zip(found, pages, strict=True)
        ] == [True] * 3


def test_a_crash_a_hang_and_a_swelling_cost_one_image_each():
    with Sandbox(timeout_s=1.0, child=POISONED_CHILD) as sandbox:
        good, array = png()
        started = time.monotonic()
        for poison, expected in (
            (b"SEGV", ErrorClass.DECODER_CRASHED),
            (b"HANG", ErrorClass.DECODER_TIMEOUT),
            (b"SWELL", ErrorClass.IMAGE_TOO_LARGE),
        ):
            assert error_of(sandbox, poison) == expected
            assert np.array_equal(sandbox.decode(good, "image")[0][:, :, 0], array)
        assert time.monotonic() - started < 20


def test_bad_images_keep_the_child():
    with Sandbox() as sandbox:
        assert error_of(sandbox, b"no picture") == ErrorClass.NOT_AN_IMAGE
        child = sandbox._process.pid
        assert error_of(sandbox, b"") == ErrorClass.EMPTY_FILE
        assert sandbox._process.pid == child


def test_a_child_killed_from_outside_loses_no_image():
    with Sandbox(child=POISONED_CHILD, timeout_s=30) as sandbox:
        data, array = png()
        sandbox.decode(data, "image")
        victim = sandbox._process.pid
        os.kill(victim, signal.SIGKILL)
        assert np.array_equal(sandbox.decode(data, "image")[0][:, :, 0], array)
        assert sandbox._process.pid != victim


def test_large_requests_do_not_block_on_a_full_pipe():
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG", compress_level=0)
    with Sandbox() as sandbox:
        assert np.array_equal(sandbox.decode(buffer.getvalue(), "image")[0], noise)


def test_each_thread_may_have_its_own():
    data, array = png()
    wrong = []

    def work():
        with Sandbox() as sandbox:
            for _ in range(20):
                if not np.array_equal(sandbox.decode(data, "image")[0][:, :, 0], array):
                    wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
