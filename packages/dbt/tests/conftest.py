"""What the test modules share: settings of hypothesis and small fitted models."""

import numpy as np
import pytest
from hypothesis import settings

from decathlon.dbt import DBTClassifier, DBTRegressor

settings.register_profile("dbt", deadline=None)  # a busy machine is no failure
settings.load_profile("dbt")


@pytest.fixture(scope="session")
def table():
    """Covariates (150, 3), the first and third of them with an effect, and a response (150,)."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(150, 3))
    return x, 10 + 3 * x[:, 0] + (x[:, 2] > 0) * rng.normal(size=150)


@pytest.fixture(scope="session")
def regressor(table):
    """A fitted regressor that no test changes."""
    return DBTRegressor(n_steps=8, n_noise=3, mean_cv=2, n_samples=20, random_state=0).fit(*table)


@pytest.fixture(scope="session")
def joint(table):
    """A fitted regressor of two outputs that no test changes."""
    x, y = table
    return DBTRegressor(n_steps=6, n_noise=3, mean_cv=2, n_samples=20, random_state=0).fit(x, np.column_stack([y, -y]))


@pytest.fixture(scope="session")
def binary(table):
    """A fitted classifier of two classes that no test changes."""
    x, y = table
    return DBTClassifier(n_steps=6, n_noise=3, mean_cv=2, n_samples=20, random_state=0).fit(x, (y > 10).astype(int))


@pytest.fixture(scope="session")
def three_classes(table):
    """A fitted classifier of three named classes that no test changes."""
    x, y = table
    label = np.array(["low", "middle", "high"])[np.digitize(y, [8, 12])]
    return DBTClassifier(n_steps=6, n_noise=3, mean_cv=2, n_samples=20, random_state=0).fit(x, label)
