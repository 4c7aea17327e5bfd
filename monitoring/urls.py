"""Include at the root: the paths are where probes and scrapers look."""

from django.urls import path

from monitoring import views

urlpatterns = [
    path("health", views.health, name="health"),
    path("livez", views.livez, name="livez"),
    path("readyz", views.readyz, name="readyz"),
    path("metrics", views.metrics, name="metrics"),
]
