"""Pictures and pages that tell what a run did; pictures need matplotlib (extra `report`)."""
