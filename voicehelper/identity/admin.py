"""Tenants, users and API tokens in the admin. Writes go through the services, so that their events are emitted."""

from typing import TYPE_CHECKING, Any, cast

from django.contrib import admin, messages
from django.contrib.auth.admin import UserAdmin as DjangoUserAdmin
from django.core.exceptions import ValidationError
from django.db import transaction
from django.db.models import Model, Q, QuerySet
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.utils import timezone

from events_outbox.admin import ReadOnlyAdmin
from events_outbox.admin.cells import moment
from events_outbox.admin.confirmation import chosen_again, confirm, is_confirmed, reason_of
from events_outbox.admin.read_only import AT_ONCE, ModelAdmin, TenantConfined, tenant_of
from events_outbox.operators import note_action

from .models import ApiToken, Tenant, User
from .services import Refused, change_role, create_tenant, deactivate_user, register_user, revoke_token
from .throttling import LoginThrottle

if TYPE_CHECKING:
    from django.contrib.auth.forms import (
        AdminPasswordChangeForm,
        AuthenticationForm,
        UserChangeForm,
        UserCreationForm,
    )
else:
    from unfold.forms import AdminPasswordChangeForm, AuthenticationForm, UserChangeForm, UserCreationForm


class LoginForm(AuthenticationForm):
    """With the API's limit on guessing: the attempts of both are counted together."""

    def clean(self) -> dict[str, Any]:
        username = self.cleaned_data.get("username")
        if username is not None and not LoginThrottle().may_try(username):
            raise ValidationError("Too many attempts to log in with this name: try again in a minute.")
        return super().clean()


admin.site.login_form = LoginForm


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
        """Who is no superuser makes none, and gives permissions by roles alone. Nobody goes to another tenant."""
        readonly = super().get_readonly_fields(request, obj)
        if obj is not None and obj.tenant_id is not None:
            readonly = (*readonly, "tenant")  # events, conversations and tokens of the user are this one's
        return readonly if request.user.is_superuser else (*readonly, "is_superuser", "user_permissions")

    def get_form(self, request: HttpRequest, obj: User | None = None, change: bool = False, **kwargs: Any) -> Any:
        form = super().get_form(request, obj, change=change, **kwargs)
        if obj is None:
            form.base_fields["tenant"].required = True
        return form

    def changeform_view(
        self,
        request: HttpRequest,
        object_id: str | None = None,
        form_url: str = "",
        extra_context: dict[str, Any] | None = None,
    ) -> HttpResponse:
        try:
            answer: HttpResponse = super().changeform_view(request, object_id, form_url, extra_context)
        except Refused as error:  # its transaction is rolled back by now
            self.message_user(request, f"{error} Nothing was changed.", messages.ERROR)
            return HttpResponseRedirect(request.get_full_path())
        return answer

    def save_model(self, request: HttpRequest, obj: User, form: Any, change: bool) -> None:
        by = cast(User, request.user)
        if change:
            self._save_change(request, obj, form, by)
            return
        if obj.tenant is None:
            super().save_model(request, obj, form, change)
            return
        registered = register_user(
            tenant=obj.tenant,
            username=obj.username,
            password=form.cleaned_data["password1"],
            role=obj.role,
            by=by,
        )
        _become(obj, registered)

    def _save_change(self, request: HttpRequest, obj: User, form: Any, by: User) -> None:
        """Save what was changed; the role and a deactivation are events, unless the user is of no tenant."""
        changed = set(form.changed_data)
        if "tenant" in changed or obj.tenant_id is None:
            super().save_model(request, obj, form, True)
            return
        is_deactivated = "is_active" in changed and not obj.is_active
        by_service = {"role", "is_active"} if is_deactivated else {"role"}
        # These first: they lock the tenant's row before the user's.
        if "role" in changed:
            change_role(user=obj, role=obj.role, by=by)
        if is_deactivated:
            deactivate_user(user=obj, by=by)
        # Not the whole row: what somebody else has just changed stays.
        many = {field.name for field in obj._meta.many_to_many}
        obj.save(update_fields=changed - by_service - many)

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False  # deactivate instead: conversations keep their author


class StateFilter(admin.SimpleListFilter):
    title = parameter_name = "state"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [(value, value) for value in ApiToken.State.values]

    def queryset(self, request: HttpRequest, queryset: QuerySet[ApiToken]) -> QuerySet[ApiToken]:
        is_over = Q(expires_at__lte=timezone.now())
        conditions = {
            ApiToken.State.VALID: Q(revoked_at__isnull=True) & ~is_over,
            ApiToken.State.EXPIRED: Q(revoked_at__isnull=True) & is_over,
            ApiToken.State.REVOKED: Q(revoked_at__isnull=False),
        }
        condition = conditions.get(self.value())  # type: ignore[call-overload]
        return queryset if condition is None else queryset.filter(condition)


@admin.register(ApiToken)
class ApiTokenAdmin(ReadOnlyAdmin):
    """Tokens can be looked at and revoked. What opens the API is not there to be shown."""

    tenant_field = "user__tenant_id"
    list_display = ["prefix_cell", "name", "user", "scope_list", "token_state", "last_used", "created"]
    list_filter = [StateFilter]
    list_select_related = ["user"]
    time_field = "created_at"
    exact_search = ["id", "user__username"]
    search_fields = ["^prefix", "^name"]
    search_help_text = "an id or user name, whole; the beginning of a token or name"
    fields = (
        "name",
        "user",
        "prefix",
        "scope_list",
        "token_state",
        "by_login",
        "created_at",
        "last_used_at",
        "expires_at",
        "revoked_at",
        "replaced_by",
    )
    export_fields = (
        "id",
        "user_id",
        "name",
        "prefix",
        "scope_list",
        "token_state",
        "by_login",
        "created_at",
        "last_used_at",
        "expires_at",
        "revoked_at",
    )
    actions = ["revoke"]

    def lookup_allowed(self, lookup: str, value: Any, request: HttpRequest) -> bool:
        return not lookup.startswith("secret_hash") and super().lookup_allowed(lookup, value, request)

    @admin.display(description="token")
    def prefix_cell(self, token: ApiToken) -> str:
        return f"{token.prefix}…"

    @admin.display(description="scopes")
    def scope_list(self, token: ApiToken) -> str:
        return ", ".join(token.scopes)

    @admin.display(description="state")
    def token_state(self, token: ApiToken) -> str:
        return token.state.value

    @admin.display(description="last used")
    def last_used(self, token: ApiToken) -> str:
        return moment(token.last_used_at)

    @admin.display(description="created")
    def created(self, token: ApiToken) -> str:
        return moment(token.created_at)

    def has_revoke_permission(self, request: HttpRequest) -> bool:
        return request.user.has_perm("identity.revoke_apitoken")

    def page_buttons(self, request: HttpRequest, obj: ApiToken) -> list[tuple[str, str, str]]:
        return super().page_buttons(request, obj) if obj.revoked_at is None else []

    @admin.action(description="Revoke: refuse them from now on", permissions=["revoke"])
    def revoke(self, request: HttpRequest, queryset: QuerySet[ApiToken]) -> HttpResponse | None:
        """Show the tokens, ask for the reason, then revoke them."""
        chosen = list(queryset.filter(revoked_at__isnull=True).select_related("user").order_by("id")[: AT_ONCE + 1])
        if not chosen:
            self.message_user(request, "None of them is there to be revoked any more", messages.WARNING)
            return None
        if len(chosen) > AT_ONCE:
            self.message_user(request, f"Select at most {AT_ONCE}", messages.ERROR)
            return None
        if not is_confirmed(request, needs_reason=True):
            return confirm(
                self,
                request,
                title="Revoke API tokens",
                introduction="Whoever uses them is refused from the next request on. Nothing makes them valid again.",
                facts=[("Revoked", len(chosen))],
                columns=("Token", "Name", "User", "Scopes", "State", "Last used"),
                rows=[
                    (
                        token.prefix,
                        token.name,
                        token.user.username,
                        ", ".join(token.scopes),
                        token.state.value,
                        moment(token.last_used_at),
                    )
                    for token in chosen
                ],
                action="revoke",
                fields=chosen_again(chosen),
                button=f"Revoke {len(chosen)}",
                needs_reason=True,
                danger=True,
                back=request.get_full_path(),
            )
        revoked = sum(self._revoke(request, token, reason_of(request)) for token in chosen)
        self.message_user(request, f"{revoked} API tokens revoked")
        return None

    @transaction.atomic
    def _revoke(self, request: HttpRequest, token: ApiToken, reason: str) -> bool:
        """Revoke one and note who did it and why, both or neither."""
        by = cast(User, request.user)
        if not revoke_token(token=token, reason=reason, by=by):
            return False
        note_action("token.revoked", consumer="", subject=str(token.id), by=str(by), reason=reason)
        self.log(request, token, f"Revoked: {reason}")
        return True


def _become(obj: Model, saved: Model) -> None:
    """Make the form's unsaved object stand for the row that the service wrote."""
    obj.__dict__.update(saved.__dict__)
