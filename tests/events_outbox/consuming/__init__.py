"""An app with consumers for the tests of `consume` in real processes: each event leaves a mark of who handled it."""
