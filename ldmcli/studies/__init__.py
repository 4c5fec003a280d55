"""Many runs, or many pictures, looked at together: preference of people, neighbours in the training set."""
