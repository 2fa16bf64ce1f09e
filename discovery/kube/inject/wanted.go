package inject

import (
	"fmt"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hanse-mesh/hanse/discovery/kube"
)

// Label of a Namespace, and label or annotation of a Pod (the label wins), that says whether Pods get a sidecar.
const (
	Label    = "hanse.mesh/inject"
	enabled  = "enabled"
	disabled = "disabled"
)

// Wanted says whether a Pod in a namespace with these labels gets a sidecar, and why not. A value that means nothing is an error.
func Wanted(namespace map[string]string, meta *metav1.ObjectMeta, spec *corev1.PodSpec) (yes bool, why string, err error) {
	own := meta.Annotations[Label]
	if v, has := meta.Labels[Label]; has {
		own = v
	}
	switch own {
	case disabled:
		return false, "the Pod says " + Label + ": " + disabled, nil
	case enabled:
	case "":
		switch v := namespace[Label]; v {
		case enabled:
		case "", disabled:
			return false, "neither its namespace nor the Pod says " + Label + ": " + enabled, nil
		default:
			return false, "", fmt.Errorf("namespace label %s: %q: want %s or %s", Label, v, enabled, disabled)
		}
	default:
		return false, "", fmt.Errorf("%s: %q: want %s or %s", Label, own, enabled, disabled)
	}
	switch {
	case meta.Annotations[kube.SidecarAnnotation] != "":
		return false, "it has a sidecar", nil
	case spec.HostNetwork:
		return false, "it is in its node's network, where nothing can be captured for it alone", nil
	case spec.OS != nil && spec.OS.Name == corev1.Windows:
		return false, "its node runs Windows", nil
	}
	return true, "", nil
}
