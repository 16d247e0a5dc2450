"""Names nearest to one that is not known."""

from veneer.plain.nearest import nearest


def test_neighbouring_letters_that_changed_places_are_one_slip() -> None:
    known = ["lora", "road", "loha", "hra", "ia3"]
    assert nearest("lroa", known, n=1) == ["lora"]
    assert nearest("lroa", known)[0] == "lora"
    assert nearest("loar", known, n=1) == ["lora"]
    assert nearest("raod", known, n=1) == ["road"]
