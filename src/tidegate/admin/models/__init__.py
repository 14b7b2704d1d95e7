"""Models of the control plane's requests and responses, one module per resource.

Routes, the command line and the OpenAPI description use the same models.
"""

from __future__ import annotations

from tidegate.admin.models.api_keys import (
    KeyCreate,
    KeyMade,
    KeyPage,
    KeyPatch,
    KeyRead,
    KeyRotated,
    OverridesRequest,
    RevokeRequest,
    RotateRequest,
)
from tidegate.admin.models.base import (
    JsonObject,
    KeyId,
    Name,
    PageModel,
    Plain,
    Reason,
    RequestModel,
    Resource,
    ResponseModel,
    Row,
    TierName,
    Timestamp,
    is_key_id,
)
from tidegate.admin.models.customers import CustomerCreate, CustomerFields, CustomerPage, CustomerPatch, CustomerRead
from tidegate.admin.models.overrides import LimitOverride
from tidegate.admin.models.policy import ChangeRead, ImportRead
from tidegate.admin.models.problems import Problem, ProblemRead
from tidegate.admin.models.records import AuditPage, AuditRead, TopRead, ViolationPage, ViolationRead, ViolatorRead
from tidegate.admin.models.rules import RuleCreate, RuleFields, RulePage, RulePatch, RuleRead
from tidegate.admin.models.tiers import TierCreate, TierLimits, TierPage, TierPatch, TierRead
from tidegate.admin.models.tokens import TokenCreate, TokenMade, TokenPage, TokenRead
from tidegate.admin.models.usage import ResetRead, ResetRequest, RuleUsageRead, UsageRead, WindowUsageRead

__all__ = [
    "AuditPage",
    "AuditRead",
    "ChangeRead",
    "CustomerCreate",
    "CustomerFields",
    "CustomerPage",
    "CustomerPatch",
    "CustomerRead",
    "ImportRead",
    "JsonObject",
    "KeyCreate",
    "KeyId",
    "KeyMade",
    "KeyPage",
    "KeyPatch",
    "KeyRead",
    "KeyRotated",
    "LimitOverride",
    "Name",
    "OverridesRequest",
    "PageModel",
    "Plain",
    "Problem",
    "ProblemRead",
    "Reason",
    "RequestModel",
    "ResetRead",
    "ResetRequest",
    "Resource",
    "ResponseModel",
    "RevokeRequest",
    "RotateRequest",
    "Row",
    "RuleCreate",
    "RuleFields",
    "RulePage",
    "RulePatch",
    "RuleRead",
    "RuleUsageRead",
    "TierCreate",
    "TierLimits",
    "TierName",
    "TierPage",
    "TierPatch",
    "TierRead",
    "Timestamp",
    "TokenCreate",
    "TokenMade",
    "TokenPage",
    "TokenRead",
    "TopRead",
    "UsageRead",
    "ViolationPage",
    "ViolationRead",
    "ViolatorRead",
    "WindowUsageRead",
    "is_key_id",
]
