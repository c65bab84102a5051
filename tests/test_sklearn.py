import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks
from proxy_losses.integrations.sklearn import LinearRanker
def expected(e): return {"check_sample_weight_equivalence_on_dense_data":"x"}
@parametrize_with_checks([LinearRanker(max_iter=20)], expected_failed_checks=expected)
def test_checks(estimator, check):
    check(estimator)
