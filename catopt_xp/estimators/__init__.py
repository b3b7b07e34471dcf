"""scikit-learn's face: MLPClassifier and MLPRegressor."""
