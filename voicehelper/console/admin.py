"""Groups and tokens in the theme, as everything else in the admin."""

from django.contrib import admin
from django.contrib.auth.admin import GroupAdmin as DjangoGroupAdmin
from django.contrib.auth.models import Group
from rest_framework.authtoken.admin import TokenAdmin as RestTokenAdmin
from rest_framework.authtoken.models import TokenProxy

from events_outbox.admin.read_only import ModelAdmin, TenantConfined

admin.site.unregister([Group, TokenProxy])


@admin.register(Group)
class GroupAdmin(DjangoGroupAdmin, ModelAdmin):
    pass


@admin.register(TokenProxy)
class TokenAdmin(TenantConfined, RestTokenAdmin, ModelAdmin):
    tenant_field = "user__tenant_id"
    autocomplete_fields = ["user"]
