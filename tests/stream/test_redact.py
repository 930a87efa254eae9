import pickle

import pytest

from sonoforge_trainer.redact import KeyHasher

KEY = b"0123456789abcdef"


def test_a_hash_is_the_first_twelve_hex_digits_of_hmac_sha256():
    # printf patient-7/clip-3/frame-12 | openssl dgst -sha256 -hmac 0123456789abcdef
    assert KeyHasher(KEY).hash("patient-7/clip-3/frame-12") == "16cd366faab0"


def test_two_keys_name_a_sample_differently():
    assert KeyHasher(KEY).hash("a") != KeyHasher(KEY[::-1]).hash("a")


def test_the_key_is_read_from_the_named_file_without_the_line_end(tmp_path):
    path = tmp_path / "key"
    path.write_bytes(KEY + b"\n")
    assert KeyHasher.from_env({"SONOFORGE_HASH_KEY_FILE": str(path)}) == KeyHasher(KEY)


def test_without_a_file_every_hasher_draws_its_own_key():
    assert KeyHasher.from_env({}).hash("a") != KeyHasher.from_env({}).hash("a")


def test_a_missing_key_file_is_named_with_the_variable(tmp_path):
    with pytest.raises(ValueError, match=r"SONOFORGE_HASH_KEY_FILE: the key file .*absent cannot be read"):
        KeyHasher.from_env({"SONOFORGE_HASH_KEY_FILE": str(tmp_path / "absent")})


def test_a_short_key_is_refused_and_not_shown(tmp_path):
    path = tmp_path / "key"
    path.write_bytes(b"secret")
    with pytest.raises(ValueError, match="has 6 bytes; give at least 16") as caught:
        KeyHasher.from_env({"SONOFORGE_HASH_KEY_FILE": str(path)})
    assert "secret" not in str(caught.value)


def test_the_key_is_not_in_the_representation():
    assert KEY.decode() not in repr(KeyHasher(KEY))


def test_a_hasher_reaches_worker_processes_unchanged():
    copied = pickle.loads(pickle.dumps(KeyHasher(KEY)))
    assert copied.hash("a") == KeyHasher(KEY).hash("a")
