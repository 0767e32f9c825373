# Sourced: RUN_IN as arguments of srun (in_srun) and as a command in front of another (in_front); PATH for a venv.
in_srun=() in_front=()
case ${RUN_IN:-} in
  '') ;;
  *.sif) in_front=(apptainer exec --nv --bind "$PWD${MOUNTS:+,$MOUNTS}" --pwd "$PWD" "$RUN_IN") ;;
  *.sqsh | *:*)
    mounts=$PWD:$PWD
    for folder in ${MOUNTS//,/ }; do mounts+=,$folder:$folder; done
    in_srun=(--container-image="$RUN_IN" --container-mounts="$mounts" --container-workdir="$PWD")
    ;;
  *)
    [ -x "$RUN_IN/bin/python" ] || { echo "RUN_IN: no virtual environment at $RUN_IN" >&2; exit 2; }
    export PATH=$(cd "$RUN_IN/bin" && pwd):$PATH
    ;;
esac
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
