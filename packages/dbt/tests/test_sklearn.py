"""Both estimators as scikit-learn sees them."""

import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from decathlon.dbt import DBTClassifier, DBTRegressor

WEIGHTED_FOLDS = {
    "check_sample_weight_equivalence_on_dense_data": (
        "folds and noise are drawn a row, so a row of weight 2 is not bit for bit two rows of weight 1"
    )
}


@pytest.mark.slow
@parametrize_with_checks(
    [DBTRegressor(n_steps=10, random_state=0), DBTClassifier(n_steps=10, random_state=0)],
    expected_failed_checks=lambda estimator: WEIGHTED_FOLDS,
)
def test_estimator_check(estimator, check):
    check(estimator)
