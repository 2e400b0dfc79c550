"""What is read beside a saved model, and what is told about it."""

from hf_compressm.runs import description


def test_records_that_cannot_be_read_are_warned_about(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(description.logger, "warning", said.append)
    assert description.saved_records(str(tmp_path)) == [] and not said
    (tmp_path / "finetuning.json").write_text('{"history": [{"event": "cut"}]}')
    (tmp_path / "compression.json").write_text('{"history": [')
    assert description.saved_records(str(tmp_path)) == [{"event": "cut"}]
    assert len(said) == 1 and "compression.json cannot be read" in said[0]
