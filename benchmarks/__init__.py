"""Quality and speed comparisons over all packages of the repository; run from its top folder."""
