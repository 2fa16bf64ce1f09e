// Package lab runs whole Kubernetes clusters on one Linux machine, as root, with the unmodified programs in bin/tools and containerd:
//
//	                      fab (bridge)
//	       ┌───────────────────┴───────────────────┐
//	a: 10.9.0.1, pods 10.244.1.0/24     b: 10.9.0.2, pods 10.245.1.0/24
//	   etcd, kube-apiserver, controller manager, scheduler, containerd, kubelet, kube-proxy, CoreDNS
//
// Everything is in namespaces of one process (PIDs, mounts, network): however it ends, all that it has started ends with it, and the machine is as before. After a kill -9 there are
// empty cgroups, which the next lab removes. Labs do not see each other. Images come from files, since there is no registry and no way out.
//
// With several nodes (Config.Nodes) the others have containerd, kubelet and kube-proxy: 10.9.0.11, pods 10.244.2.0/24, and so on.
//
// Hosts (10.9.0.101, …) are machines on the same bridge that have nothing but their network.
//
// Pods of one cluster cannot reach those of another, unless the lab is Flat; nodes can reach each other.
//
// The cluster's DNS answers clusterset.local, too, by CoreDNS' option multicluster: apart from cluster.local, which need not wait for the kind ServiceImport.
package lab
