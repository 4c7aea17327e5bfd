from django.urls import path

from .views import (
    MeView,
    RotateTokenView,
    TenantView,
    TokenDetailView,
    TokensView,
    TokenView,
    UsersView,
    UserView,
)

urlpatterns = [
    path("auth/token", TokenView.as_view()),
    path("auth/me", MeView.as_view()),
    path("me", MeView.as_view()),
    path("tenant", TenantView.as_view()),
    path("users", UsersView.as_view()),
    path("users/<uuid:pk>", UserView.as_view()),
    path("tokens", TokensView.as_view()),
    path("tokens/<uuid:pk>", TokenDetailView.as_view()),
    path("tokens/<uuid:pk>/rotate", RotateTokenView.as_view()),
]
