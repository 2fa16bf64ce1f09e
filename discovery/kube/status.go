package kube

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	mcsv1alpha1 "sigs.k8s.io/mcs-api/pkg/apis/v1alpha1"
	mcsv1beta1 "sigs.k8s.io/mcs-api/pkg/apis/v1beta1"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/discovery/objects"
)

// exportConditions returns the conditions of a ServiceExport as they should be (KEP-1645 "Status"), those of other controllers kept, and
// whether they differ from what it has. of is the Service, if there is one, home what of it is not exported.
func exportConditions(o, of objects.Object, home *unexported, view *discovery.Clusterset, self string, now time.Time) (conditions []metav1.Condition, differ bool) {
	e := o.Value.(*mcsv1alpha1.ServiceExport)
	conditions = slices.Clone(e.Status.Conditions)
	set := func(t mcsv1beta1.ServiceExportConditionType, status metav1.ConditionStatus, reason mcsv1beta1.ServiceExportConditionReason, message string, args ...any) {
		meta.SetStatusCondition(&conditions, metav1.Condition{Type: string(t), Status: status, Reason: string(reason), Message: fmt.Sprintf(message, args...),
			ObservedGeneration: e.Generation, LastTransitionTime: metav1.NewTime(now)})
	}
	service := view.Local.Services.Get(o.Name())
	spec, _ := of.Value.(*corev1.Service)
	switch {
	case service != nil && service.Export != nil:
		set(mcsv1beta1.ServiceExportConditionValid, metav1.ConditionTrue, mcsv1beta1.ServiceExportReasonValid, "Service %s is exported", o.Name())
		set(mcsv1beta1.ServiceExportConditionReady, metav1.ConditionTrue, mcsv1beta1.ServiceExportReasonExported, "%s", cmp.Or(home.message(service), "other clusters may read it"))
	case spec != nil && spec.Spec.Type == corev1.ServiceTypeExternalName:
		set(mcsv1beta1.ServiceExportConditionValid, metav1.ConditionFalse, mcsv1beta1.ServiceExportReasonInvalidServiceType,
			"Service %s is an ExternalName, which cannot be exported", o.Name())
		set(mcsv1beta1.ServiceExportConditionReady, metav1.ConditionFalse, mcsv1beta1.ServiceExportReasonFailed, "there is nothing to export")
	case spec == nil:
		set(mcsv1beta1.ServiceExportConditionValid, metav1.ConditionFalse, mcsv1beta1.ServiceExportReasonNoService, "there is no Service %s", o.Name())
		set(mcsv1beta1.ServiceExportConditionReady, metav1.ConditionFalse, mcsv1beta1.ServiceExportReasonPending, "it is exported when the Service is there")
	default: // not in this view yet
		set(mcsv1beta1.ServiceExportConditionReady, metav1.ConditionUnknown, mcsv1beta1.ServiceExportReasonPending, "it is being exported")
	}
	reason, message := mcsv1beta1.ServiceExportReasonNoConflicts, "all clusters that export it agree"
	status := metav1.ConditionFalse
	if i := view.Imports.Get(o.Name()); i != nil {
		var reasons, messages []string
		for _, c := range i.ConflictsOf(self) {
			if !slices.Contains(reasons, c.Reason) {
				reasons = append(reasons, c.Reason)
			}
			messages = append(messages, c.Message)
		}
		if len(reasons) > 0 {
			slices.Sort(reasons)
			status, reason, message = metav1.ConditionTrue, mcsv1beta1.ServiceExportConditionReason(strings.Join(reasons, ",")), strings.Join(messages, "; ")
		}
	}
	set(mcsv1beta1.ServiceExportConditionConflict, status, reason, "%s", message[:min(len(message), 32768)])
	return conditions, !equality.Semantic.DeepEqual(e.Status.Conditions, conditions)
}

// importConditions returns the conditions of a ServiceImport as they should be.
func importConditions(is, want *mcsv1beta1.ServiceImport, i *discovery.Import, now time.Time) []metav1.Condition {
	conditions := slices.Clone(is.Status.Conditions)
	c := mcsv1beta1.NewServiceImportCondition(mcsv1beta1.ServiceImportConditionReady, metav1.ConditionTrue, mcsv1beta1.ServiceImportReasonReady, "it can be called")
	switch {
	case want.Spec.Type == mcsv1beta1.ClusterSetIP && len(want.Spec.IPs) == 0:
		c = mcsv1beta1.NewServiceImportCondition(mcsv1beta1.ServiceImportConditionReady, metav1.ConditionFalse, mcsv1beta1.ServiceImportReasonPending, "it has no clusterset IP yet")
	case want.Spec.Type == mcsv1beta1.ClusterSetIP && len(i.IPFamilies) > 0 && !slices.Contains(i.IPFamilies, discovery.IPFamily(want.Spec.IPFamilies[0])):
		c = mcsv1beta1.NewServiceImportCondition(mcsv1beta1.ServiceImportConditionReady, metav1.ConditionFalse, mcsv1beta1.ServiceImportReasonIPFamilyNotSupported,
			fmt.Sprintf("it is exported by %v, this cluster's Services have %v: only workloads with a sidecar can call it", i.IPFamilies, want.Spec.IPFamilies))
	}
	c.LastTransitionTime, c.ObservedGeneration = metav1.NewTime(now), is.Generation
	meta.SetStatusCondition(&conditions, c)
	return conditions
}
