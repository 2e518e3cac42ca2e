"""One clip in, the edited clips out: tuning on the clip, inversion, sampling with attention
control.
"""
