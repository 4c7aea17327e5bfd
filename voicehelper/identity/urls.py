from django.urls import path

from .views import MeView, TokenView

urlpatterns = [
    path("auth/token", TokenView.as_view()),
    path("auth/me", MeView.as_view()),
]
