"""Tenants and users in the admin. New ones go through the services, so that their events are emitted."""

from typing import TYPE_CHECKING, Any, cast

from django.contrib import admin
from django.contrib.auth.admin import UserAdmin as DjangoUserAdmin
from django.db.models import Model
from django.http import HttpRequest

from events_outbox.admin.read_only import ModelAdmin, TenantConfined, tenant_of

from .models import Tenant, User
from .services import create_tenant, register_user

if TYPE_CHECKING:
    from django.contrib.auth.forms import AdminPasswordChangeForm, UserChangeForm, UserCreationForm
else:
    from unfold.forms import AdminPasswordChangeForm, UserChangeForm, UserCreationForm


class NewUserForm(UserCreationForm):  # type: ignore[type-arg]
    """With a password always: the usual form also makes users without one."""

    usable_password = None


class OwnTenant(TenantConfined):
    """The staff of a tenant looks at the tenant's own, and changes nothing: tenants and users are the operators'."""

    def has_add_permission(self, request: HttpRequest) -> bool:
        return super().has_add_permission(request) and tenant_of(request) is None

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return super().has_change_permission(request, obj) and tenant_of(request) is None


@admin.register(Tenant)
class TenantAdmin(OwnTenant, ModelAdmin):
    tenant_field = "pk"
    list_display = ["name", "id", "created_at"]
    search_fields = ["name"]
    readonly_fields = ["id", "created_at"]

    def save_model(self, request: HttpRequest, obj: Tenant, form: Any, change: bool) -> None:
        if change:
            super().save_model(request, obj, form, change)
            return
        _become(obj, create_tenant(name=obj.name, by=cast(User, request.user)))

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False  # events and rows of every domain refer to it


@admin.register(User)
class UserAdmin(OwnTenant, DjangoUserAdmin, ModelAdmin):  # type: ignore[type-arg]  # not subscriptable at runtime
    list_display = ["username", "tenant", "role", "is_active", "is_staff"]
    list_filter = ["role", "is_active", "is_staff"]
    list_select_related = ["tenant"]
    search_fields = ["username", "email", "tenant__name"]
    autocomplete_fields = ["tenant"]
    fieldsets = (*(DjangoUserAdmin.fieldsets or ()), ("Tenant", {"fields": ("tenant", "role")}))
    form = UserChangeForm
    change_password_form = AdminPasswordChangeForm
    add_form = NewUserForm
    add_fieldsets = ((None, {"fields": ("tenant", "role", "username", "password1", "password2")}),)

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        may_change = super().has_change_permission(request, obj)
        return may_change and (obj is None or request.user.is_superuser or not obj.is_superuser)

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> Any:
        """Who is no superuser makes none, and gives permissions by roles alone."""
        readonly = super().get_readonly_fields(request, obj)
        return readonly if request.user.is_superuser else (*readonly, "is_superuser", "user_permissions")

    def get_form(self, request: HttpRequest, obj: User | None = None, change: bool = False, **kwargs: Any) -> Any:
        form = super().get_form(request, obj, change=change, **kwargs)
        if obj is None:
            form.base_fields["tenant"].required = True
        return form

    def save_model(self, request: HttpRequest, obj: User, form: Any, change: bool) -> None:
        if change or obj.tenant is None:
            super().save_model(request, obj, form, change)
            return
        registered = register_user(
            tenant=obj.tenant,
            username=obj.username,
            password=form.cleaned_data["password1"],
            role=obj.role,
            by=cast(User, request.user),
        )
        _become(obj, registered)

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False  # deactivate instead: conversations keep their author


def _become(obj: Model, saved: Model) -> None:
    """Make the form's unsaved object stand for the row that the service wrote."""
    obj.__dict__.update(saved.__dict__)
